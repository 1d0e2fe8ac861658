"""The blocks of `python -m benchmarks.gpu`: a module each, whose `run(job)` measures and writes rows as it goes."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Block:
    """A part of the command with a process and a time limit of its own."""

    title: str
    what: str  # for docs/gpu.md: what is done, and what it shows
    limit_s: float
    module: str
    environment: Mapping[str, str] = field(default_factory=dict)


_HERE = "benchmarks.gpu.blocks"

# In the order in which they run: what is learned a minute comes first. The limits add up to ten minutes.
BLOCKS: dict[str, Block] = {
    "tests": Block(
        "The tests marked gpu",
        "Every test that needs a GPU, with its outcome.",
        85,
        f"{_HERE}.marked_tests",
    ),
    "agreement": Block(
        "CUDA against the CPU",
        "The gradient of one step of the production model (configs/librispeech_100.yaml, dropout and masks on), of the "
        "same weights and utterances, compared with float64 on the CPU. Differences are relative: of the losses the "
        "largest, of the gradients ||dg|| / ||g|| over all weights together.",
        40,
        f"{_HERE}.agreement",
    ),
    "gru": Block(
        "GRU of 512 units",
        "A bidirectional layer of B utterances of 590 frames, bfloat16: both directions in turn, as the encoder runs "
        "them, in two streams, and as one bidirectional call of cuDNN, of equal lengths and packed. Medians.",
        25,
        f"{_HERE}.gru",
    ),
    "step": Block(
        "A whole step, micro-batches apart and fused",
        "Steps of configs/librispeech_100.yaml through the real loop, on noise of LibriSpeech's lengths, by the number "
        "of micro-batches that run as one batch. Audio counts without padding.",
        65,
        f"{_HERE}.step",
    ),
    "processes": Block(
        "Property 2: 1, 2 and 4 processes that share the GPU",
        "The same training on several ranks, joined by gloo because NCCL refuses two ranks on one GPU; float32. "
        "Differences are relative to one process; weights without a gradient are left out.",
        60,
        f"{_HERE}.processes",
    ),
    "nccl": Block(
        "NCCL with one rank",
        "A process group of one: DDP, and the collectives of a run, by the same calls as in ddp_asr/ranks/world.py.",
        25,
        f"{_HERE}.nccl",
    ),
    "program": Block(
        "The real program: signals, resume, evaluation",
        "`ddp-asr train` on tones that spell words, stopped by SIGTERM, resumed, killed by SIGKILL and resumed, beside "
        "the same run undisturbed; then `ddp-asr evaluate` on the GPU and on the CPU.",
        75,
        f"{_HERE}.program",
    ),
    "speed": Block(
        "The real program: speed",
        "`ddp-asr train` with configs/librispeech_100.yaml on FLAC from the disk, one process.",
        55,
        f"{_HERE}.speed",
    ),
    "waits": Block(
        "Host waits, and where the time goes",
        "Places at which the CPU waits for the GPU, with the number of waits in one step of four micro-batches; and "
        "the kernels of a fused step. The trace (trace.json.gz) opens in ui.perfetto.dev.",
        35,
        f"{_HERE}.waits",
    ),
    "growth": Block(
        "Memory over 2,000 shapes",
        "Forward and backward of one batch after the other, hardly two of the same shape: what PyTorch's allocator "
        "holds, and what the GPU holds beside it (libraries, their plans and workspaces). Segments grow, as in every "
        "run (ddp_asr/ranks/environment.py).",
        35,
        f"{_HERE}.growth",
    ),
    "growth_fixed": Block(
        "Memory over 2,000 shapes, in segments of fixed size",
        "The same with PYTORCH_ALLOC_CONF=expandable_segments:False.",
        35,
        f"{_HERE}.growth",
        {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
    ),
    "variants": Block(
        "Variants of a step",
        "One change at a time to the fused step above, which says what each would be worth.",
        60,
        f"{_HERE}.variants",
    ),
}
