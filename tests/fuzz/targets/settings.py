"""Settings: files, command lines, decoder files, sweeps, and what a run makes of settings that are accepted."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random

import numpy as np
import torch

from ddp_asr.config import Config, config_from_dict, load_config, load_decoder
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.loader import train_loader
from ddp_asr.decoding import make_decoder
from ddp_asr.features.log_mel import LogMel
from ddp_asr.model import make_model
from ddp_asr.settings import declared, describe
from ddp_asr.text import make_tokeniser
from ddp_asr.training import dry_run
from ddp_asr.training.optim import learning_rate, make_optimizer
from ddp_asr.training.session import make_schedule
from launch.search import read_sweep, trial_values
from tests.fuzz.mutate import NUMBERS, WORDS, Tree, mutate_text
from tests.fuzz.target import Target, Wrong
from tests.fuzz.targets.shards import SETTINGS, make_shards
from tests.fuzz.worker import REPOSITORY

TRIALS = 50  # of a sweep: a grid of any size is valid


def _same_again(config: Config) -> None:
    """What is saved with the run must give the same settings."""
    saved = Path("saved.yaml")
    saved.write_text(describe(config), encoding="utf8")
    if load_config(saved) != config:
        raise Wrong(f"the settings are others when they are saved and loaded: {describe(config)}")


class SettingsFile(Target):
    """Settings files in YAML"""

    name = "settings"
    share = 90

    def seeds(self) -> list[Tree]:
        texts = [path.read_bytes() for path in sorted((REPOSITORY / "configs").glob("*.yaml"))]
        return [{"mine.yaml": text} for text in (*texts, describe(config_from_dict({}, "defaults")).encode())]

    def read(self, directory: Path) -> None:
        _same_again(load_config(directory / "mine.yaml"))


class Arguments(Target):
    """Settings on the command line"""

    name = "arguments"
    share = 60

    def seeds(self) -> list[Tree]:
        given = ("--train.epochs=3", "--decoder.kind=beam", "--decoder.size=4", "--augment.speeds=0.9,1,1.1")
        return [{"arguments.txt": "\0".join(given).encode()}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        if random.random() < 0.2:
            text = tree["arguments.txt"]
            assert isinstance(text, bytes)
            return {"arguments.txt": mutate_text(text, random)}
        return {"arguments.txt": "\0".join(_drawn_settings(random)).encode(errors="surrogatepass")}

    def read(self, directory: Path) -> None:
        _same_again(load_config(None, _arguments(directory)))


def _arguments(directory: Path) -> list[str]:
    return (directory / "arguments.txt").read_bytes().decode(errors="replace").split("\0")


_NAMES = [each.name for kind in ("greedy", "beam") for each in declared(Config, {"decoder.kind": kind})]


def _drawn_settings(random: Random) -> list[str]:
    """One to three settings with values at and beyond the ends of what is allowed."""
    drawn = []
    for _ in range(random.choice((1, 1, 2, 3))):
        values = [
            random.choice((*NUMBERS[:-4], "2", "16", "1e9", "123456789", "0.3"))
            for _ in range(random.choice((1, 1, 2)))
        ]
        word = random.choice(WORDS).decode(errors="replace")
        value = (
            ",".join(values) if random.random() < 0.8 else random.choice((word, f"[{','.join(values)}]", f"[{word}"))
        )
        drawn.append(f"--{random.choice(_NAMES)}={value}")
    return drawn


class DryRun(Target):
    """Settings that are accepted, up to the first batch of a run on tiny shards"""

    name = "dry-run"
    share = 25

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.shards = make_shards(scratch)

    def seeds(self) -> list[Tree]:
        return [{"arguments.txt": b"--train.epochs=3"}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        return {"arguments.txt": "\0".join(_drawn_settings(random)).encode(errors="surrogatepass")}

    def read(self, directory: Path) -> None:
        arguments = [argument for argument in _arguments(directory) if not argument.startswith(("--data.", "--run."))]
        tree = {**SETTINGS, "data": {"train": [str(self.shards)], "test": [str(self.shards)], "threads": 0}}
        config = load_config(_saved(tree, self.scratch), [*arguments, f"--run.dir={self.scratch / 'runs'}"])
        dry_run.report(config, 1)
        corpus = read_corpus(config)
        schedule = make_schedule(config, corpus.plan.steps_per_epoch)
        for step in (1, schedule.total_steps // 2, schedule.total_steps):
            if not np.isfinite(rate := learning_rate(step, schedule.total_steps, config.optim)):
                raise Wrong(f"the learning rate of step {step} of {schedule.total_steps} is {rate}")
        torch.manual_seed(config.train.seed)
        model, log_mel = make_model(config, corpus.tokeniser.size), LogMel(config.features)
        make_optimizer(model, config.optim)
        index, tokeniser, plan = corpus.index, corpus.tokeniser, corpus.plan
        batch = next(train_loader(index, tokeniser, plan, config, rank=0, world_size=1, pin_memory=False))
        features, frames = log_mel(batch.waveforms, batch.samples)
        with torch.no_grad():
            logits = model.eval()(features, frames).logits
        make_decoder(config.decoder, tokeniser, config.frame_s)(logits, config.encoder.output_frames(frames))


def _saved(tree: dict, directory: Path) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(describe(config_from_dict(tree, "the test")), encoding="utf8")
    return path


class DecoderFile(Target):
    """Decoder files and hot words, and the decoder of each that is accepted, at work"""

    name = "decoder"
    share = 50
    mutated = ("decoder.yaml", "hot.txt")

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.tokeniser = make_tokeniser(config_from_dict({"vocabulary": {"symbols": "ab "}}, "the test").vocabulary)
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(2, 12, self.tokeniser.size, generator=generator)

    def seeds(self) -> list[Tree]:
        from tests.fuzz.targets.models import ARPA

        beam = b"decoder:\n  kind: beam\n  size: 8\n  lm: case/lm.arpa\n  lm_weight: 0.5\n  symbol_bonus: 1.0\n"
        beam += b"  word_bonus: 0.5\n  symbols_per_frame: 2\n  n_best: 2\n  hot_words: case/hot.txt\n"
        greedy = b"# settings\ntrain: {epochs: 3}\ndecoder: {kind: greedy}\n"
        return [{"decoder.yaml": text, "lm.arpa": ARPA, "hot.txt": b"ab\nb a\n"} for text in (beam, greedy)]

    def read(self, directory: Path) -> None:
        decoder = make_decoder(load_decoder(directory / "decoder.yaml"), self.tokeniser, 0.025)
        hypotheses = decoder(self.logits, torch.tensor([12, 7]))
        for hypothesis in hypotheses:
            if hypothesis.text != " ".join(word.text for word in hypothesis.words):
                raise Wrong(f"the text {hypothesis.text!r} is not that of its words")


class SweepFile(Target):
    """Files of launch.sweep"""

    name = "sweep"
    share = 40
    mutated = ("sweep.yaml",)

    def seeds(self) -> list[Tree]:
        config = (REPOSITORY / "configs" / "demo.yaml").read_bytes()
        grid = b"config: case/base.yaml\nsearch: grid\nsettings:\n  optim.learning_rate: [1e-3, 2e-3]\n"
        drawn = b"name: drawn\nconfig: case/base.yaml\nsearch: random\ntrials: 4\nsettings:\n"
        drawn += b"  optim.learning_rate: {min: 1e-4, max: 1e-2, scale: log}\n  encoder.rnn_layers: [1, 2]\n"
        drawn += b"fixed: {train.epochs: 2}\n"
        return [{"sweep.yaml": text, "base.yaml": config} for text in (grid, drawn)]

    def read(self, directory: Path) -> None:
        sweep = read_sweep(directory / "sweep.yaml")
        for values in itertools.islice(trial_values(sweep), TRIALS):
            load_config(Path(sweep.config), [f"--{name}={value}" for name, value in values.items()])
