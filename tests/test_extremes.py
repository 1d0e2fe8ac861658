"""Every setting at the ends of its range and beyond: refused in a sentence, or a run that it allows can begin.

The settings and their ranges come from the declarations, so a new setting is tested without a line here.
"""

import contextlib
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from ddp_asr.config import config_from_dict, load_config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.index import read_index
from ddp_asr.data.loader import eval_loader, train_loader
from ddp_asr.decoding import make_decoder
from ddp_asr.errors import UserError, users_error
from ddp_asr.model import make_model
from ddp_asr.ranks.rendezvous import join
from ddp_asr.ranks.world import World, backend_timeout
from ddp_asr.settings import LARGEST, SMALLEST, describe, flatten, read_yaml
from ddp_asr.training.dry_run import report
from ddp_asr.training.rehearsal import rehearse, sizes_to_try
from ddp_asr.training.session import make_learner, make_schedule
from tests.test_config import KIND_OF, SETTINGS

LIMIT_S = 300  # far above what one takes; it is there for what never ends
NUMBERS = {name: each for name, each in SETTINGS.items() if each.type in (int, float, list[int], list[float])}
TEXTS = [name for name, each in SETTINGS.items() if each.type in (str, list[str]) and not each.choices]
EXTREMES = ["0", "-1", "-0.0", "1e-300", "1e300", "-1e300", "1e309", "nan", "inf", "-inf", str(2**63), str(2**64)]
EXTREMES += ["9" * 400, "9" * 5000, "0x10", "1_0", "\u0663", " 1"]
EXTREME_TEXTS = [
    "",
    ".",
    "..",
    "/",
    "../x",
    "x/..",
    "x/./y",
    "/x",
    "x/",
    "~",
    "*",
    "n" * 300,
    "x/" * 3000 + "x",
    "-",
    "{}",
]
EXTREME_TEXTS += ["\udcff", "a\0b", "\n", "\u2028", "\u202e", "'", "\U0001f600"]


def ends(name):
    """The least and the largest number that the setting may be."""
    each = NUMBERS[name]
    least = max(each.at_least, -LARGEST, math.nextafter(each.above, math.inf))
    most = min(each.at_most if each.at_most < math.inf else LARGEST, math.nextafter(each.below, -math.inf))
    if each.type in (int, list[int]):
        return math.ceil(least) if each.at_least == -math.inf else each.at_least, int(most)
    return (least if least <= 0 else max(least, SMALLEST)), most


@pytest.fixture
def in_time():
    def stop(*_):
        raise AssertionError(f"it takes longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def load(corpus, runs, name, text):
    path, *settings = corpus.arguments(runs, kind=KIND_OF[name].get("encoder.kind"))[1:]
    given = {**KIND_OF[name], name: text}
    return load_config(Path(path), [*settings, *(f"--{key}={value}" for key, value in given.items())])


def begin(config):
    """Everything that comes before the first step of a run, the step, and what the settings do beside it."""
    report(config, 1)
    corpus, world = read_corpus(config), World(0, 1, 0, torch.device("cpu"))
    learner = make_learner(config, world, corpus, None)
    rehearse(corpus, learner, sizes_to_try(config.train.fuse_micro_batches, config.batch.micro_batches, world.device))
    total_steps = make_schedule(config, corpus.plan.steps_per_epoch).total_steps
    loader = train_loader(corpus.index, corpus.tokeniser, corpus.plan, config, rank=0, world_size=1)
    with contextlib.closing(loader) as batches:
        batch = next(batches)
    for step in (1, total_steps):
        learner.accumulate(batch, step=step, last=True)
        learner.update(step, total_steps, float(batch.utterances))
    assert next(iter(eval_loader(read_index(config.data.test), corpus.tokeniser, config))) is not None
    decoder = make_decoder(config.decoder, corpus.tokeniser, config.frame_s)
    decoder(torch.randn(1, 5, corpus.tokeniser.size), torch.tensor([5]))
    backend_timeout(config.distributed.timeout_s)
    join(config.distributed).leave()


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_nobody_means_is_refused(name):
    least, most = ends(name)
    for text in EXTREMES:
        try:
            tree = {**KIND_OF[name], name: text}
            found = flatten(config_from_dict(tree, "the test"))[name]
        except UserError as error:
            assert len(str(error)) < 6000 and "\n" not in str(error)
            continue
        for number in found if isinstance(found, list) else [found]:
            assert least <= number <= most and (number == 0 or abs(number) >= min(SMALLEST, 1)), text


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_a_run_may_begin_at_either_end_of_a_range(tiny_corpus, tmp_path, in_time, name):
    for end in ends(name):
        with contextlib.suppress(UserError):  # most do not go together with this corpus
            begin(load(tiny_corpus, tmp_path, name, repr(end)))


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_refused_or_stays_what_it_is_and_where_it_belongs(tiny_corpus, tmp_path, in_time, name):
    runs = tmp_path / "runs"
    for text in EXTREME_TEXTS:
        try:
            config = load(tiny_corpus, runs, name, text)
            path = tmp_path / "config.yaml"
            path.write_text(describe(config), encoding="utf8")
            assert config_from_dict(read_yaml(path), "the test") == config
            run = os.path.normpath(Path(config.run.dir) / config.run.name)
            assert name == "run.dir" or run.startswith(f"{runs}/")
            report(config, 1)
        except (UserError, OSError) as error:
            assert users_error(error), text


def test_a_run_is_not_named_after_a_file_of_dots(tmp_path):
    (tmp_path / "..yaml").write_text("")
    with pytest.raises(UserError, match=r"run\.name must be the name of a directory"):
        load_config(tmp_path / "..yaml")


def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(in_time):
    for sizes in ("encoder.rnn_size", "encoder.conv_channels"):
        config = config_from_dict({sizes: "65536"}, "the test")
        with pytest.raises(UserError, match=r"has [\d,]+ parameters, which need [\d,]+ GB, and this machine has"):
            make_model(config, 29)
