"""What only a CUDA GPU can show: the number types that really run, overflows, memory, and a resume on its kernels.

cuDNN chooses another algorithm for a GRU of 256 or 512 units, the sizes of real models, than for one of 16 or 64.
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_asr import config
from ddp_asr.config import load_config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.loader import train_loader
from ddp_asr.encoders import make_encoder
from ddp_asr.encoders.dropout import Dropout
from ddp_asr.features.log_mel import LogMel
from ddp_asr.model import make_model
from ddp_asr.ranks.signals import StopRequest
from ddp_asr.ranks.world import World
from ddp_asr.training.loop import Evaluation, Hooks, Progress, Schedule, Trainer
from ddp_asr.training.precision import autocast, set_matmul_precision
from ddp_asr.training.rehearsal import rehearse, sizes_to_try
from ddp_asr.training.session import make_learner
from tests import tiny_training as tiny

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
K = 4
SIZES = pytest.mark.parametrize("rnn_size", [16, 256, 512])
SMALL_AND_LARGE = pytest.mark.parametrize("rnn_size", [16, 512])


@pytest.fixture
def settings(tiny_corpus):
    """Settings of the tiny corpus, without dropout; further overrides come after."""

    def of(*overrides):
        path, *given = tiny_corpus.arguments(Path("runs"), "run", "--encoder.dropout=0", *overrides)[1:]
        return load_config(Path(path), given)

    return of


@pytest.fixture(autouse=True)
def tf32_as_it_was():
    yield
    set_matmul_precision("fp32")
    torch.backends.cudnn.allow_tf32 = True


def learner_of(settings, precision="fp32"):
    """The learner of a run, and the corpus."""
    set_matmul_precision(precision)
    corpus = read_corpus(settings)
    settings = replace(settings, train=replace(settings.train, precision=precision))
    return make_learner(settings, World(0, 1, 0, DEVICE), corpus, None), corpus


def batches_of(settings, corpus, fuse):
    """The micro-batches of a whole training, in order, on the device, so many in a batch."""
    data = (corpus.index, corpus.tokeniser, corpus.plan, settings)
    loader = train_loader(*data, rank=0, world_size=1, fuse=fuse, pin_memory=False)
    return (batch.to(DEVICE) for batch in loader)


def train(learner, corpus, settings, epochs=1, fuse=1):
    """The loop itself, with hooks that keep the train lines and the messages."""
    lines, messages = [], []
    schedule = Schedule(corpus.plan.steps_per_epoch, epochs, 0, 0, 0.0, 0, max_nonfinite_steps=0, max_bad_samples=0)

    hooks = Hooks(
        log=lambda line: lines.append(line) if line["kind"] == "train" else None,
        save=lambda state, best: None,
        flush=lambda: None,
        message=messages.append,
        evaluate=lambda step, should_stop: Evaluation(score=None),
        dump=lambda step, batches: None,
    )
    progress = Progress()
    trainer = Trainer(learner.world, learner, schedule, hooks, StopRequest())
    outcome = trainer.run(batches_of(settings, corpus, fuse), range(K), progress)
    assert outcome.state == "done"
    return lines, messages, progress


# ---- number types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("tf32", 0.01), ("bf16", 0.05), ("fp16", 0.02)])
def test_a_training_in_every_precision_learns_and_keeps_float32_weights(settings, precision, tolerance):
    chosen = settings("--train.epochs=8")
    exact, *_ = train(*learner_of(chosen), chosen, epochs=8)
    learner, corpus = learner_of(chosen, precision)
    lines, _, progress = train(learner, corpus, chosen, epochs=8)
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=tolerance)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert progress.skipped == progress.overflows
    state = itertools.chain(learner.model.parameters(), *(s.values() for s in learner.optimizer.state.values()))
    assert {tensor.dtype for tensor in state} == {torch.float32}


def test_an_fp16_overflow_is_skipped_answered_and_counted_apart(settings):
    chosen = settings("--train.epochs=8")
    learner, corpus = learner_of(chosen, "fp16")
    learner.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    lines, messages, progress = train(learner, corpus, chosen, epochs=8)  # max_nonfinite_steps is 0
    assert 0 < progress.overflows == progress.skipped < len(lines)
    assert messages == []
    assert learner.scaler.get_scale() == 2.0 ** (24 - progress.overflows)
    assert lines[0]["skipped"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in learner.model.parameters())


class Seen(TorchDispatchMode):
    """Notes the type of the first tensor of each operation."""

    def __init__(self):
        super().__init__()
        self.types = {}

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        if arguments and isinstance(arguments[0], torch.Tensor):
            self.types.setdefault(operation.overloadpacket.__name__, set()).add(arguments[0].dtype)
        return operation(*arguments, **(named or {}))


@SIZES
@pytest.mark.parametrize(
    "precision, expected", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_cudnns_gru_runs_in_the_type_that_was_asked_for(settings, precision, expected, rnn_size):
    """Autocast's own wrapper would make float16 of it, and a type that cuDNN refuses would run frame by frame.

    cuDNN's warning about scattered weights would be an error here.
    """
    learner, _ = learner_of(settings(f"--encoder.rnn_size={rnn_size}"), precision)
    frames = torch.tensor([40, 31])
    with Seen() as seen, autocast(precision, DEVICE):
        logits = learner.model(torch.randn(2, 40, 16, device=DEVICE), frames).logits
        logits.float().sum().backward()
    assert seen.types["_cudnn_rnn"] == {expected}
    assert seen.types["_cudnn_rnn_backward"] == {expected}
    assert {parameter.grad.dtype for parameter in learner.model.parameters()} == {torch.float32}


# ---- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5, 64), (2, 1_025, 3)], ids=str)
def test_dropout_drops_on_a_gpu_what_it_drops_on_a_cpu(dtype, shape):
    """Forwards and backwards: the kernel against the eager expression."""
    dropout = Dropout(0.3)
    dropout.site = 7
    seeds = torch.arange(shape[0]) * 0x5DEECE66D
    x = (torch.rand(shape) + 0.5).to(dtype)  # no zeros
    kept = []
    for device in ("cpu", DEVICE):
        given = x.detach().to(device).requires_grad_()
        out = dropout(given, seeds.to(device))
        out.backward(torch.ones_like(out))
        assert torch.equal(given.grad == 0, out == 0)
        kept.append(out.cpu())
    assert torch.equal(kept[0] == 0, kept[1] == 0) and 0.6 < float((kept[0] != 0).double().mean()) < 0.8
    torch.testing.assert_close(*kept)


# ---- padding -------------------------------------------------------------------------------------------------------


BIGRUS = [{"time_strides": strides, "rnn_size": size} for strides in ([2], [2, 1], [3, 2]) for size in (16, 256, 512)]
CONFORMERS = [{"kind": "conformer", "time_strides": strides} for strides in ([2, 2], [2, 2, 2])]


@pytest.mark.parametrize("encoder", [*BIGRUS, *CONFORMERS], ids=str)
@torch.no_grad()
def test_an_utterance_alone_and_beside_31_longer_ones_gives_the_same_logits(encoder):
    set_matmul_precision("fp32")
    settings = config.config_from_dict({"encoder": encoder}, "the test")
    torch.manual_seed(0)
    model = make_model(settings, 29).to(DEVICE).eval()
    log_mel = LogMel(settings.features).to(DEVICE)
    samples = torch.tensor([4_001] + [4_200 + 97 * n for n in range(31)])
    waveforms = torch.randint(-9_000, 9_000, (32, int(samples.max())), dtype=torch.int16)
    waveforms[torch.arange(waveforms.shape[1]) >= samples[:, None]] = 0
    waveforms = waveforms.to(DEVICE)
    together, frames, _ = model(*log_mel(waveforms, samples))
    for row in (0, 1, 17):
        alone, (own,), _ = model(*log_mel(waveforms[row : row + 1, : samples[row]], samples[row : row + 1]))
        assert own == frames[row] == alone.shape[1]
        assert (together[row, :own] - alone[0]).abs().max() < 1e-5 * alone.abs().max()


# ---- attention -----------------------------------------------------------------------------------------------------


def run_conformer(precision, frames, context=None):
    """Forward and backward of a Conformer; its hidden states."""
    torch.manual_seed(0)
    settings = config.config_from_dict({"encoder": {"kind": "conformer", "blocks": 2}}, "the test")
    encoder = make_encoder(settings.encoder, 128).to(DEVICE).eval()
    features = torch.randn(len(frames), max(frames), 128, device=DEVICE)
    with autocast(precision, DEVICE):
        hidden = encoder(features, torch.tensor(frames), context).hidden
    hidden.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    return hidden


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_rows_and_chunks_of_padding_alone_are_finite(precision):
    assert run_conformer(precision, [400, 0, 3, 400], [0, 0, 9, 9]).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_memory_of_attention_is_proportional_to_the_frames(precision):
    peaks = []
    for frames in (8_000, 8_001, 16_001):  # the first warms up; no multiple of 8
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        run_conformer(precision, [frames, frames - 100])
        peaks.append(torch.cuda.max_memory_allocated(DEVICE) - before)
    assert peaks[2] < 2.2 * peaks[1]


# ---- fused micro-batches -------------------------------------------------------------------------------------------


@SIZES
def test_fused_micro_batches_are_the_same_steps(settings, rnn_size):
    """Property 2, with all that is random."""
    chosen = settings("--train.epochs=2", "--encoder.dropout=0.2", f"--encoder.rnn_size={rnn_size}")
    apart, *fused = (train(*learner_of(chosen), chosen, epochs=2, fuse=fuse)[0] for fuse in (1, 3, K))
    for lines in fused:
        for name in ("loss", "gradient_norm"):
            assert [line[name] for line in lines] == pytest.approx([line[name] for line in apart], rel=1e-4)


def test_the_rehearsal_halves_what_does_not_fit(settings):
    large = ("--features.mel_bands=128", "--features.n_fft=1024", "--encoder.conv_channels=128")
    chosen = settings(*large)
    learner, corpus = learner_of(chosen)
    one, together = (rehearse(corpus, learner, [fuse]).peak_bytes for fuse in (1, K))
    limit = (one + 0.6 * (together - one)) / torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(limit, DEVICE)
    try:
        rehearsed = rehearse(corpus, learner, sizes_to_try(0, K, DEVICE))
        assert rehearsed.fuse in (1, 2) and f"{K} micro-batches as one batch, which need too much" in rehearsed.lines[0]
        train(learner, corpus, chosen, fuse=rehearsed.fuse)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


# ---- a whole run ---------------------------------------------------------------------------------------------------


@SMALL_AND_LARGE
def test_a_stop_is_invisible_on_a_gpu(tiny_corpus, tmp_path, rnn_size):
    """Property 3: to 1e-4 in float32, because the backward pass of CTC adds in no fixed order there."""
    on_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    size = f"--encoder.rnn_size={rnn_size}"
    tiny.train(tiny_corpus.arguments(tmp_path, "whole", size), **on_gpu)
    for stop in (["--train.stop_at_step=6"], []):
        tiny.train(tiny_corpus.arguments(tmp_path, "resumed", size, *stop), **on_gpu)
    for run in ("whole", "resumed"):
        assert json.loads((tmp_path / run / "environment.json").read_text())["cuda"], "not on the GPU"
    # Without the weights that have no gradient but rounding, which is other rounding each time.
    assert tiny.weight_distance(tmp_path / "whole", tmp_path / "resumed") < 1e-4
    losses = [
        [line["loss"] for line in tiny.metrics(tmp_path / run) if line["kind"] == "train"]
        for run in ("whole", "resumed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@SMALL_AND_LARGE
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_needs_more_memory_than_the_rehearsal(settings, precision, rnn_size):
    chosen = settings("--encoder.conv_channels=32", f"--encoder.rnn_size={rnn_size}")
    learner, corpus = learner_of(chosen, precision)
    rehearsed = rehearse(corpus, learner, [1])
    assert all("peak" in line and "GiB" in line for line in rehearsed.lines)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    steps, *_ = train(learner, corpus, chosen)  # each train line has the peak since the one before
    # cuDNN takes work space as it sees fit for each shape.
    assert max(line["gpu_memory_gb"] for line in steps) <= 1.02 * rehearsed.peak_bytes / 1e9
