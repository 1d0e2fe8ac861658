"""The settings of a run: what can be set, its default, its range, and whether it shapes the result.

    config = load_config(Path("configs/an4.yaml"), ["--train.epochs=3"])
    config.train.epochs                      # 3
    config.encoder.kind                      # "rescnn_bigru"

Each class below is a section. How values are read, checked and written is in settings.py. A method `check` refuses
values that do not go together; it stands in the smallest class that contains all of them.

A setting that shapes the result (`shapes_result`, on a section for all settings in it) decides what is trained, so a
checkpoint can only be continued with the same value. All others may change between attempts of one run. The data is
compared by a fingerprint of its utterances and not by its paths, so `data` does not count as shaping the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError
from ddp_asr.files import scheme_of
from ddp_asr.settings import from_dict, load, read_yaml, section, setting


@dataclass(frozen=True)
class Run:
    """Where the files of the run are."""

    name: str = setting("", "directory of the run inside run.dir; empty: named after the config file")
    dir: str = setting("runs", "directory that holds the runs", also_called="output_dir")

    def check(self) -> None:
        """The run must lie inside run.dir, in a directory of its own."""
        if self.name and not {"", ".", ".."}.isdisjoint(self.name.split("/")):
            raise UserError(
                "run.name must be the name of a directory inside run.dir, without '.', '..' and a '/' at either end, "
                f"not {self.name!r}"
            )


@dataclass(frozen=True)
class Data:
    """Training and test data, and how they are read."""

    train: list[str] = setting(
        ["shards/train-clean-100"],
        "shard directories to train on, mixed; paths or URLs (s3://, gs://, az://, https://)",
        not_empty=True,
    )
    test: list[str] = setting(
        ["shards/dev-clean"], "shard directories to evaluate on; may be empty", also_called="valid validation dev"
    )
    cache_dir: str = setting(
        "", "local directory to copy shards to, once for all ranks of a node; empty: read them where they are"
    )
    cache_gb: float = setting(
        0.0,
        "maximum size of data.cache_dir in 10^9 bytes; shards beyond it are read where they are; 0: no limit",
        at_least=0,
        at_most=1e9,
    )
    threads: int = setting(
        2,
        "threads of a rank that decode audio; 0: its main thread",
        at_least=0,
        at_most=256,
        also_called="workers num_workers",
    )
    prefetch: int = setting(
        8,
        "micro-batches that a rank's threads decode ahead together, at least one batch for each thread",
        at_least=1,
        at_most=4096,
    )
    test_max_seconds: float = setting(
        480.0,
        "maximum seconds of a batch of an evaluation: utterances x longest; error rates do not depend on it",
        above=0,
        at_most=100_000,
        also_called="eval_batch_size",
    )
    max_bad_samples: int = setting(10, "the run stops after more utterances than this fail to decode", at_least=0)
    noise: list[str] = setting(
        [], "shard directories of noises, for augment.background", also_called="musan noise_dir noise_manifest"
    )
    rooms: list[str] = setting(
        [], "shard directories of the impulse responses of rooms, for augment.room", also_called="rirs rir_dir"
    )


@dataclass(frozen=True)
class Characters:
    """Every character is a class; the blank is one more class, the last."""

    kind: str = field(default="characters", init=False)

    symbols: str = setting(
        "' abcdefghijklmnopqrstuvwxyz", "all characters, in class order", not_empty=True, also_called="alphabet labels"
    )
    lowercase: bool = setting(True, "lower-case transcripts first")
    drop: str = setting("", "characters to remove from transcripts first, such as punctuation")

    def check(self) -> None:
        _check_symbols(self.symbols)


@dataclass(frozen=True)
class Pieces:
    """Word pieces: frequent parts of words are classes, learnt by sentencepiece (see text/pieces.py)."""

    kind: str = field(default="pieces", init=False)

    size: int = setting(
        256, "number of pieces; the blank is one more class", at_least=2, at_most=32_768, also_called="vocab_size"
    )
    model: str = setting(
        "",
        "file of `ddp-asr vocabulary`; empty: pieces are learnt from the training transcripts when the run begins",
        also_called="bpe_model spm tokenizer_path",
    )
    symbols: str = setting(
        "' abcdefghijklmnopqrstuvwxyz",
        "the characters that pieces are made of; each is a piece, too",
        not_empty=True,
        also_called="alphabet",
    )
    lowercase: bool = setting(True, "lower-case transcripts first")
    drop: str = setting("", "characters to remove from transcripts first, such as punctuation")

    def check(self) -> None:
        _check_symbols(self.symbols)
        reserved = sorted({"\u2581", "\u2585"} & set(self.symbols))
        if reserved:
            raise UserError(
                f"vocabulary.symbols has {''.join(reserved)!r}, which sentencepiece uses for itself: take it out, and "
                "write the space as a space"
            )
        fewest = len({" ", *self.symbols})
        if self.size < fewest:
            raise UserError(
                f"vocabulary.size = {self.size} is below the {fewest} characters of vocabulary.symbols with the space, "
                "each of which is a piece: raise the former or shorten the latter"
            )


def _check_symbols(symbols: str) -> None:
    if len(set(symbols)) != len(symbols):
        twice = sorted({symbol for symbol in symbols if symbols.count(symbol) > 1})
        raise UserError(
            f"vocabulary.symbols must hold each symbol once, and {''.join(twice)!r} is repeated in "
            f"{symbols!r}: remove the repetition"
        )


@dataclass(frozen=True)
class Batch:
    """How an epoch is divided into steps (see data/plan.py)."""

    max_seconds: float = setting(
        120.0,
        "maximum seconds of a micro-batch: utterances x longest",
        above=0,
        at_most=100_000,
        also_called="batch_size max_duration",
    )
    micro_batches: int = setting(
        8,
        "K, the micro-batches in a step, and the maximum number of processes",
        at_least=1,
        at_most=65_536,
        also_called="accumulate_grad_batches",
    )
    buckets: int = setting(
        30, "maximum number of duration buckets; small data gets fewer, so that micro-batches stay full", at_least=1
    )


@dataclass(frozen=True)
class Features:
    """Log-mel features (see features/log_mel.py)."""

    mel_bands: int = setting(
        128, "F, the number of mel bands", at_least=1, at_most=1024, also_called="n_mels num_mel_bins"
    )
    window_ms: float = setting(
        25.0, "length of the analysis window", above=0, at_most=1000, also_called="win_length window_size"
    )
    hop_ms: float = setting(
        12.5, "distance between two frames", above=0, at_most=1000, also_called="hop_length window_stride"
    )
    n_fft: int = setting(
        1024, "points of the Fourier transform; the window is padded to it", at_least=2, at_most=65_536
    )

    @property
    def window_samples(self) -> int:
        return int(self.window_ms * SAMPLE_RATE_HZ / 1000)

    @property
    def hop_samples(self) -> int:
        return int(self.hop_ms * SAMPLE_RATE_HZ / 1000)

    def frames(self, samples: Any) -> Any:
        """T of S: complete windows, 0 where not one fits. For ints, numpy arrays and tensors alike."""
        count = 1 + (samples - self.window_samples) // self.hop_samples
        return count * (count > 0)

    def check(self) -> None:
        for name, length_ms in (("window_ms", self.window_ms), ("hop_ms", self.hop_ms)):
            if not (length_ms * SAMPLE_RATE_HZ / 1000).is_integer():
                raise UserError(
                    f"features.{name} must be a whole number of samples at {SAMPLE_RATE_HZ // 1000} kHz, a multiple of "
                    f"{1000 / SAMPLE_RATE_HZ:g} ms, not {length_ms!r}"
                )
        if self.n_fft < self.window_samples:
            raise UserError(
                f"features.n_fft = {self.n_fft} is shorter than features.window_ms = {self.window_ms:g}, "
                f"{self.window_samples} samples: raise the former or lower the latter"
            )
        if empty := self._empty_bands():
            raise UserError(
                f"{empty} of features.mel_bands = {self.mel_bands} bands lie between two of the frequencies of "
                f"features.n_fft = {self.n_fft}, so they would hear nothing: lower the former or raise the latter"
            )

    def _empty_bands(self) -> int:
        """Triangular filters, equally wide on the mel scale (O'Shaughnessy, 1987), without a frequency inside."""
        nyquist_hz = SAMPLE_RATE_HZ / 2
        top = math.log1p(nyquist_hz / 700)
        edges_hz = [700 * math.expm1(top * i / (self.mel_bands + 1)) for i in range(self.mel_bands + 2)]
        bin_hz = nyquist_hz / (self.n_fft // 2)  # torchaudio's, for an odd n_fft, too
        inside = [
            math.ceil(high / bin_hz) - 1 > low / bin_hz for low, high in zip(edges_hz, edges_hz[2:], strict=False)
        ]
        return inside.count(False)


@dataclass(frozen=True)
class Noise:
    """White noise added to waveforms."""

    share: float = setting(0.0, "fraction of utterances that get noise", at_least=0, at_most=1)
    snr_db_min: float = setting(15.0, "signal-to-noise ratio of the loudest noise, in dB", at_least=-200, at_most=200)
    snr_db_max: float = setting(40.0, "signal-to-noise ratio of the faintest noise, in dB", at_least=-200, at_most=200)

    def check(self) -> None:
        _check_range("augment.noise.snr_db", self.snr_db_min, self.snr_db_max)


def _check_range(name: str, lowest: float, highest: float) -> None:
    if lowest > highest:
        raise UserError(
            f"{name}_min = {lowest:g} is above {name}_max = {highest:g}: lower the former or raise the latter"
        )


@dataclass(frozen=True)
class Background:
    """Recorded noise added to waveforms, from the shards in data.noise (see features/noise.py)."""

    share: float = setting(0.0, "fraction of utterances that get recorded noise", at_least=0, at_most=1)
    snr_db_min: float = setting(10.0, "signal-to-noise ratio of the loudest noise, in dB", at_least=-200, at_most=200)
    snr_db_max: float = setting(30.0, "signal-to-noise ratio of the faintest noise, in dB", at_least=-200, at_most=200)

    def check(self) -> None:
        _check_range("augment.background.snr_db", self.snr_db_min, self.snr_db_max)


@dataclass(frozen=True)
class Pitch:
    """A change of pitch that keeps the tempo (see features/pitch.py)."""

    share: float = setting(0.0, "fraction of utterances whose pitch is changed", at_least=0, at_most=1)
    semitones: float = setting(2.0, "change of pitch at most, up or down, in semitones", at_least=0.25, at_most=12)


@dataclass(frozen=True)
class Room:
    """Reverberation, by the impulse responses in data.rooms (see features/room.py)."""

    share: float = setting(0.0, "fraction of utterances that are reverberated", at_least=0, at_most=1)


@dataclass(frozen=True)
class Volume:
    """A change of volume (see features/volume.py)."""

    share: float = setting(0.0, "fraction of utterances whose volume is changed", at_least=0, at_most=1)
    db_min: float = setting(-20.0, "change of volume at least, in dB", at_least=-90, at_most=90)
    db_max: float = setting(10.0, "change of volume at most, in dB", at_least=-90, at_most=90)

    def check(self) -> None:
        _check_range("augment.volume.db", self.db_min, self.db_max)


@dataclass(frozen=True)
class Augment:
    """Augmentation of training utterances, seeded by utterance and epoch (see features/masks.py and data/loader.py)."""

    frequency_masks: int = setting(1, "SpecAugment frequency masks for each utterance", at_least=0, at_most=1000)
    frequency_mask_bands: int = setting(15, "maximum width of a frequency mask, in mel bands", at_least=0)
    time_masks: int = setting(2, "SpecAugment time masks for each utterance", at_least=0, at_most=1000)
    time_mask_share: float = setting(
        0.05, "maximum width of a time mask, as a fraction of the utterance", at_least=0, at_most=1
    )
    speeds: list[float] = setting(
        [1.0], "speed factors, one is drawn for each utterance and epoch", not_empty=True, at_least=0.1, at_most=10
    )
    noise: Noise = section(Noise)
    background: Background = section(Background)
    pitch: Pitch = section(Pitch)
    room: Room = section(Room)
    volume: Volume = section(Volume)


class StridedConvolutions:
    """Lengths behind convolutions of 3x3 with these strides in time, and 2 in the bands, as both encoders begin."""

    time_strides: list[int]

    @property
    def time_reduction(self) -> int:
        """Frames of the features for one frame of the logits."""
        return math.prod(self.time_strides)

    @property
    def band_reduction(self) -> int:
        """What the number of mel bands must be divisible by."""
        return int(2 ** len(self.time_strides))

    def output_frames(self, frames: Any) -> Any:
        """T' of T: what the strided convolutions leave. For ints, numpy arrays and tensors alike."""
        for stride in self.time_strides:
            frames = (frames + stride - 1) // stride
        return frames


@dataclass(frozen=True)
class RescnnBigru(StridedConvolutions):
    """Residual convolutions and bidirectional GRUs (see encoders/rescnn_bigru.py)."""

    kind: str = field(default="rescnn_bigru", init=False)

    conv_channels: int = setting(32, "channels of every convolution", at_least=1, at_most=65_536)
    time_strides: list[int] = setting(
        [2],
        "time stride of each strided convolution, which also halves the mel bands",
        not_empty=True,
        at_least=1,
        at_most=100,
    )
    residual_blocks: int = setting(3, "pre-activation residual blocks of two convolutions", at_least=0, at_most=100)
    rnn_layers: int = setting(5, "bidirectional GRU layers", at_least=1, at_most=100, also_called="num_layers")
    rnn_size: int = setting(
        512, "GRU units in each direction", at_least=1, at_most=65_536, also_called="hidden_size d_model"
    )
    dropout: float = setting(0.1, "dropout of every layer", at_least=0, below=1)

    @property
    def layers(self) -> int:
        """The layers that `objective.intermediate_layers` counts."""
        return self.rnn_layers


@dataclass(frozen=True)
class Conformer(StridedConvolutions):
    """Self-attention and convolution in each of its blocks (see encoders/conformer.py)."""

    kind: str = field(default="conformer", init=False)

    conv_channels: int = setting(64, "channels of every strided convolution", at_least=1, at_most=65_536)
    time_strides: list[int] = setting(
        [2, 2],
        "time stride of each strided convolution, which also halves the mel bands",
        not_empty=True,
        at_least=1,
        at_most=100,
    )
    blocks: int = setting(16, "Conformer blocks", at_least=1, at_most=100, also_called="num_layers n_layers num_blocks")
    size: int = setting(
        256, "D, the size of the hidden states", at_least=1, at_most=65_536, also_called="d_model hidden_size"
    )
    heads: int = setting(
        4, "attention heads", at_least=1, at_most=1024, also_called="n_heads num_heads attention_heads nhead"
    )
    feed_forward_factor: int = setting(
        4, "inner size of the feed-forward layers / size", at_least=1, at_most=16, also_called="ff_expansion_factor"
    )
    kernel: int = setting(
        31,
        "frames that the convolution of a block covers, an odd number",
        at_least=1,
        at_most=1001,
        also_called="conv_kernel conv_kernel_size cnn_module_kernel kernel_size",
    )
    dropout: float = setting(0.1, "dropout of every layer; attention weights have none", at_least=0, below=1)

    @property
    def layers(self) -> int:
        """The layers that `objective.intermediate_layers` counts."""
        return self.blocks

    def check(self) -> None:
        # Rotary positions turn pairs of numbers, and a GPU's fused attention takes heads of 8, 16, 24 ... numbers only:
        # for others PyTorch stores the weights of all pairs of frames.
        if self.size % (8 * self.heads):
            raise UserError(
                f"encoder.size = {self.size} must be divisible by {8 * self.heads}, 8 for each of encoder.heads = "
                f"{self.heads}: choose other numbers"
            )
        if self.kernel % 2 == 0:
            raise UserError(f"encoder.kernel = {self.kernel} must be odd, so that a frame is in its middle: add 1")


@dataclass(frozen=True)
class Objective:
    """The training loss of an utterance (see objective.py)."""

    intermediate_weight: float = setting(
        0.0, "weight of the CTC losses of intermediate layers; the last layer's gets the rest", at_least=0, below=1
    )
    intermediate_layers: list[int] = setting(
        [1], "encoder layers, counted from 1, that get a CTC loss of their own", at_least=1
    )
    consistency_weight: float = setting(
        0.0, "weight of the divergence between two masked views of each utterance (CR-CTC); 0: one view", at_least=0
    )
    short_context_s: list[float] = setting(
        [],
        "two bounds, in seconds, of the encoder's context in the second view, drawn for each step; empty: all of it",
        above=0,
    )

    @property
    def views(self) -> int:
        """Masked views of each utterance in a step."""
        return 2 if self.consistency_weight else 1

    def check(self) -> None:
        bounds, layers = self.short_context_s, self.intermediate_layers
        if bounds and not (len(bounds) == 2 and bounds[0] <= bounds[1]):
            raise UserError(f"objective.short_context_s must be two rising numbers above 0, or empty, not {bounds!r}")
        if bounds and self.views == 1:
            raise UserError(
                "objective.short_context_s restricts the second view, and objective.consistency_weight = 0 makes only "
                "one view: set the latter above 0 or leave the former empty"
            )
        if len(set(layers)) != len(layers):
            raise UserError(f"objective.intermediate_layers must name each layer once, not {layers!r}")


@dataclass(frozen=True)
class Greedy:
    """The most probable class of each frame (see decoding/greedy.py)."""

    kind: str = field(default="greedy", init=False)


@dataclass(frozen=True)
class Beam:
    """CTC prefix beam search, with a language model if `lm` names one (see decoding/beam.py)."""

    kind: str = field(default="beam", init=False)

    size: int = setting(
        16, "texts kept for each utterance", at_least=1, at_most=10_000, also_called="beam_size beam_width"
    )
    lm: str = setting(
        "",
        "ARPA file (.arpa, .arpa.gz) of an n-gram model over the symbols of the vocabulary; empty: none",
        also_called="lm_path language_model kenlm_model_path",
    )
    lm_weight: float = setting(
        0.5, "factor of the language model's log-probability in the score of a text", at_least=0, also_called="alpha"
    )
    symbol_bonus: float = setting(
        0.0, "added to the score for each symbol; a language model with a large weight prefers short texts without it"
    )
    word_bonus: float = setting(0.0, "added to the score for each word", also_called="beta word_score")
    hot_words: str = setting(
        "",
        "text file of words and phrases, one a line, that get `hot_word_bonus`; empty: none",
        also_called="hotwords keywords boosting contexts",
    )
    hot_word_bonus: float = setting(
        3.0,
        "added to the score for each hot word of the text; with 3 a word may be 20 times less probable than its rival",
        at_least=0,
        also_called="hotword_weight boosting_weight context_score",
    )
    symbols_per_frame: int = setting(
        0,
        "symbols that may extend a text in a frame, the most probable ones; 0: all; with a thousand symbols 20 are "
        "about five times as fast",
        at_least=0,
        also_called="beam_size_token cutoff_top_n",
    )
    n_best: int = setting(1, "texts reported for each utterance, with their scores, the best first", at_least=1)

    def check(self) -> None:
        _check_n_best(self.n_best, self.size)


@dataclass(frozen=True)
class Lexicon:
    """CTC beam search over the words of a lexicon, with an n-gram model of words (see decoding/lexicon.py)."""

    kind: str = field(default="lexicon", init=False)

    size: int = setting(50, "hypotheses kept for each utterance", at_least=1, at_most=10_000)
    lm: str = setting("", "ARPA file (.arpa, .arpa.gz) of an n-gram model of words; empty: none")
    lexicon: str = setting(
        "",
        "text file with a word a line, perhaps with a tab and its spelling; empty: the words of the language model",
        also_called="vocab words",
    )
    lm_weight: float = setting(0.5, "factor of the language model's log-probability in the score of a text", at_least=0)
    word_bonus: float = setting(
        0.0, "added to the score for each word; a language model with a large weight prefers few words without it"
    )
    symbols_per_frame: int = setting(
        0, "classes that may extend a hypothesis in a frame, the most probable ones; 0: all", at_least=0
    )
    threshold: float = setting(
        50.0,
        "hypotheses whose score lies further than this below the best one's are dropped",
        above=0,
        also_called="beam_threshold",
    )
    n_best: int = setting(1, "texts reported for each utterance, with their scores, the best first", at_least=1)

    def check(self) -> None:
        _check_n_best(self.n_best, self.size)


DecoderSettings = Greedy | Beam | Lexicon


def _check_n_best(n_best: int, size: int) -> None:
    if n_best > size:
        raise UserError(
            f"decoder.n_best = {n_best} is above decoder.size = {size}: lower the former or raise the latter"
        )


@dataclass(frozen=True)
class Optim:
    """AdamW and its learning rate (see training/optim.py)."""

    learning_rate: float = setting(5e-4, "maximum of the learning rate", above=0, also_called="lr max_lr")
    weight_decay: float = setting(
        0.01, "decoupled weight decay of AdamW, for matrices and convolution kernels only", at_least=0, also_called="wd"
    )
    beta1: float = setting(0.9, "AdamW's decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.999, "AdamW's decay of the second moment", at_least=0, below=1)
    schedule: str = setting(
        "one_cycle",
        "how the learning rate falls after its rise: one_cycle, until the last step; inverse_sqrt, with the square "
        "root of the step",
        choices=("one_cycle", "inverse_sqrt"),
        also_called="scheduler lr_scheduler lr_schedule",
    )
    warmup_share: float = setting(
        0.3,
        "fraction of the steps in which the learning rate rises",
        at_least=0,
        at_most=1,
        also_called="warmup warmup_steps",
    )
    start_divisor: float = setting(
        25.0, "the first learning rate of one_cycle is learning_rate / start_divisor", above=0
    )
    end_divisor: float = setting(
        1e4, "the last learning rate of one_cycle is learning_rate / start_divisor / end_divisor", above=0
    )
    anneal: str = setting("linear", "shape of one_cycle's rise and fall", choices=("linear", "cosine"))
    clip_norm: float = setting(
        5.0,
        "maximum gradient norm; larger gradients are scaled down to it",
        above=0,
        also_called="grad_clip max_grad_norm",
    )
    frozen_steps: int = setting(
        0,
        "steps at the beginning in which lower layers keep their weights, see optim.frozen_layers (fine-tuning)",
        at_least=0,
        also_called="freeze_steps freeze_finetune_updates freeze_encoder",
    )
    frozen_layers: int = setting(
        0,
        "layers of the encoder that optim.frozen_steps keeps, from the features on, with what comes before them; "
        "0: the whole encoder, so that only classifiers learn",
        at_least=0,
        at_most=100,
    )
    ema_decay: float = setting(
        0.0,
        "decay of the moving average of the weights, which is evaluated in their place; 0: none",
        at_least=0,
        below=1,
    )

    def check(self) -> None:
        if self.schedule != "inverse_sqrt":
            return
        for name in ("start_divisor", "end_divisor", "anneal"):
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(
                    f"optim.{name} = {getattr(self, name)} has no meaning where optim.schedule = inverse_sqrt: "
                    "remove it, or choose one_cycle"
                )
        if not self.warmup_share:
            raise UserError(
                "optim.warmup_share must be above 0 where optim.schedule = inverse_sqrt, because the learning rate "
                "falls as sqrt(steps of the rise / step), not 0.0"
            )


@dataclass(frozen=True)
class Train:
    """The course of the run."""

    epochs: int = setting(
        10,
        "number of epochs; each trains every usable utterance once",
        at_least=1,
        shapes_result=True,
        also_called="max_epochs num_epochs",
    )
    seed: int = setting(
        0,
        "seed of order, weights, speed, noise, masks and dropout",
        at_least=0,
        at_most=2**63 - 1,
        shapes_result=True,
    )
    precision: str = setting(
        "auto",
        "arithmetic of the network; auto: bf16 where the hardware has it, else fp32",
        choices=("auto", "bf16", "fp16", "tf32", "fp32"),
        shapes_result=True,
        also_called="amp bf16 fp16",
    )
    init_from: str = setting(
        "", "checkpoint of another run to take the first weights from (fine-tuning)", also_called="pretrained"
    )
    eval_every_steps: int = setting(
        0, "steps between evaluations; 0: at the end of each epoch", at_least=0, also_called="eval_steps"
    )
    save_every_steps: int = setting(
        1000, "steps between checkpoints; 0: not by steps", at_least=0, also_called="save_steps"
    )
    save_every_min: float = setting(15.0, "minutes between checkpoints; 0: not by time", at_least=0)
    keep_last: int = setting(
        3, "newest checkpoints to keep beside the best one", at_least=1, also_called="save_total_limit"
    )
    stop_at_step: int = setting(
        0, "step after which to write a checkpoint and stop; 0: train to the end", at_least=0, also_called="max_steps"
    )
    fuse_micro_batches: int = setting(
        0,
        "a rank's micro-batches of a step that run as one batch, which changes speed and memory but not the result; "
        "0: as many as fit into the GPU's memory, one on a CPU",
        at_least=0,
    )
    max_nonfinite_steps: int = setting(
        20, "the run stops after more steps than this are skipped for a non-finite loss or gradient", at_least=0
    )


TRACKERS = ("comet", "tensorboard")


@dataclass(frozen=True)
class Tracking:
    """Tracking with Comet and TensorBoard, from the run's own files (see runs/tracking.py)."""

    to: list[str] = setting(
        ["comet"],
        "comet, tensorboard or both; tensorboard writes into the run directory",
        choices=TRACKERS,
        also_called="report_to loggers",
    )
    mode: str = setting(
        "auto",
        "auto: Comet online when COMET_API_KEY is set, else offline; off: nothing is tracked",
        choices=("auto", "online", "offline", "off"),
    )
    project: str = setting("ddp-asr", "Comet project")
    workspace: str = setting("", "Comet workspace; empty: the default of the account")
    samples: int = setting(20, "pairs of reference and hypothesis shown at each evaluation", at_least=0)
    tags: list[str] = setting([], "tags of the run, beside its precision, number of processes and config file")


@dataclass(frozen=True)
class Distributed:
    """How processes communicate, and how long they wait for each other."""

    backend: str = setting(
        "auto",
        "auto: nccl on GPUs, gloo on CPUs; with gloo several processes may share a GPU, which is slow",
        choices=("auto", "nccl", "gloo"),
    )
    timeout_s: float = setting(
        600.0, "maximum wait in a collective operation before the run fails", above=0, at_most=1_000_000
    )
    stop_grace_s: float = setting(
        20.0,
        "after a stop signal, a rank that does not finish its step within this time ends itself",
        above=0,
        at_most=1_000_000,
    )


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    run: Run = section(Run)
    data: Data = section(Data)
    vocabulary: Characters | Pieces = section(Characters, shapes_result=True, also_called="tokenizer text")
    batch: Batch = section(Batch, shapes_result=True)
    features: Features = section(Features, shapes_result=True, also_called="preprocessor frontend")
    augment: Augment = section(Augment, shapes_result=True, also_called="specaug spec_augment")
    encoder: RescnnBigru | Conformer = section(RescnnBigru, shapes_result=True, also_called="model")
    objective: Objective = section(Objective, shapes_result=True, also_called="loss")
    decoder: DecoderSettings = section(Greedy, also_called="decoding")
    optim: Optim = section(Optim, shapes_result=True, also_called="optimizer")
    train: Train = section(Train, also_called="trainer")
    tracking: Tracking = section(Tracking, also_called="comet wandb tensorboard")
    distributed: Distributed = section(Distributed)

    @property
    def frame_s(self) -> float:
        """Seconds from one frame of the logits to the next."""
        return self.features.hop_ms / 1000 * self.encoder.time_reduction

    @property
    def clips(self) -> dict[str, list[str]]:
        """Shard directories of the recordings that augmentations mix in, by the section of `augment` that does."""
        background, room = self.augment.background, self.augment.room
        uses = {"background": (background.share, self.data.noise), "room": (room.share, self.data.rooms)}
        return {name: directories for name, (share, directories) in uses.items() if share}

    def check(self) -> None:
        for name, directories in self.clips.items():
            if not directories:
                setting_name = {"background": "data.noise", "room": "data.rooms"}[name]
                raise UserError(
                    f"augment.{name}.share is above 0 and {setting_name} names no recordings: name shard directories "
                    f"in {setting_name} (ddp-asr shard makes them), or set augment.{name}.share to 0"
                )
        features, augment, objective = self.features, self.augment, self.objective
        if features.mel_bands % self.encoder.band_reduction:
            raise UserError(
                f"features.mel_bands = {features.mel_bands} must be divisible by {self.encoder.band_reduction}, "
                f"by which encoder {self.encoder.kind} reduces the bands: choose another number"
            )
        if augment.frequency_mask_bands >= features.mel_bands:
            raise UserError(
                f"augment.frequency_mask_bands = {augment.frequency_mask_bands} would hide all bands of "
                f"features.mel_bands = {features.mel_bands}: choose a smaller number"
            )
        if self.optim.frozen_layers > self.encoder.layers:
            raise UserError(
                f"optim.frozen_layers = {self.optim.frozen_layers} is more than the encoder's "
                f"{self.encoder.layers} layers: choose a smaller number, or 0 for the whole encoder"
            )
        layers = objective.intermediate_layers
        if objective.intermediate_weight and not (layers and max(layers) <= self.encoder.layers):
            raise UserError(
                f"objective.intermediate_layers must name at least one of the encoder's layers 1 to "
                f"{self.encoder.layers} and no other, not {layers!r}, or objective.intermediate_weight must be 0"
            )


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The settings in `path` (None: the defaults) with `--section.key=value` on top; the run is named after the file.

    Raises:
        UserError: an unreadable file, an unknown setting, a value of the wrong type or out of range.
    """
    config = load(Config, path, overrides)
    if config.run.name:
        return config
    run = dataclasses.replace(config.run, name="default" if path is None else path.stem)
    run.check()
    return dataclasses.replace(config, run=run)


def config_from_dict(tree: Mapping[str, Any], origin: str) -> Config:
    """The settings in a nested dict, as a checkpoint holds them; errors call it `origin`."""
    return from_dict(Config, tree, origin)


@dataclass(frozen=True)
class DecoderFile:
    """The section of a settings file that says how logits become text."""

    decoder: DecoderSettings = section(Greedy, also_called="decoding")


def load_decoder(path: Path) -> DecoderSettings:
    """The section `decoder` of a settings file; its other sections do not count.

    Raises:
        UserError: an unreadable file, one without that section, an unknown setting, or a value that is not allowed.
    """
    tree = read_yaml(path)
    if "decoder" not in tree:
        raise UserError(f"{path} has no section 'decoder': write it as 'decoder: {{kind: beam, ...}}'")
    return from_dict(DecoderFile, {"decoder": tree["decoder"]}, str(path)).decoder


def require_shards(config: Config) -> None:
    """Raises a UserError that names the commands which make the shards that are not there."""
    named = dict.fromkeys((*config.data.train, *config.data.test), "")
    named |= dict.fromkeys(itertools.chain(*config.clips.values()), " --no-text")
    # Whether a URL has shards is found out by reading them.
    missing = {Path(p): option for p, option in named.items() if not scheme_of(p) and not Path(p).is_dir()}
    if missing:
        commands = "; ".join(f"python -m ddp_asr.shard SOURCE --out {path}{missing[path]}" for path in missing)
        names = ", ".join(map(str, missing))
        raise UserError(
            f"there are no shards at {names}; make them, with a SOURCE such as a folder or the name of a LibriSpeech "
            f"split: {commands}"
        )
