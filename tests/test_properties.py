"""The design's properties 1, 2, 3, 5 and 6 on one to four real processes: the same training, whoever runs it."""

import json
from functools import partial

import pytest

from tests import tiny_training as tiny

WORLD_SIZES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus):
    """Runs of the same training on 1, 2, 3 and 4 processes, each with what its ranks wrote down."""
    runs = tmp_path_factory.mktemp("undisturbed")
    for processes in WORLD_SIZES:
        (runs / f"log-{processes}").mkdir()
        tiny.train(
            tiny_corpus.arguments(runs, f"w{processes}"), processes, [partial(tiny.writing_down, runs / f"log-{processes}")]
        )
    return runs


@pytest.mark.parametrize("processes", WORLD_SIZES)
def test_every_utterance_is_trained_once_an_epoch(undisturbed, tiny_corpus, processes):
    lines = [
        json.loads(line)
        for log in (undisturbed / f"log-{processes}").iterdir()
        for line in log.read_text().splitlines()
    ]
    assert sorted((line["step"], line["micro_batch"]) for line in lines) == [
        (step, k) for step in range(1, tiny.STEPS + 1) for k in range(4)
    ]
    for epoch in range(3):
        first = epoch * tiny.STEPS_PER_EPOCH
        steps = range(first + 1, first + tiny.STEPS_PER_EPOCH + 1)
        keys = [key for line in lines if line["step"] in steps for key in line["keys"]]
        assert sorted(keys) == [f"train-{number:02d}" for number in range(26)]
