"""What every test gets: no network mirror, one thread a process, speech to work on, skips with their reason."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# Before torch is imported anywhere. Tests start many processes on few cores, and threads would fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nobody's test run belongs into their Comet account; matplotlib must not look for a display.
os.environ.pop("COMET_API_KEY", None)
os.environ["COMET_CONFIG"] = os.devnull
os.environ["MPLBACKEND"] = "agg"

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine and every run, however slow: a failure can be looked at again.
hypothesis.settings.register_profile("ddp_asr", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ddp_asr")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


# Four processes share out the files (`make test`): the longest first, so that none is left with one of them at the end.
LONGEST = ("gpu_run", "resume", "properties", "tracking", "watchdog", "launch_sweep", "benchmarks", "cli", "world")


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several processes
        order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else ""
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA GPU here"


@pytest.fixture(scope="session")
def synthetic_corpus(tmp_path_factory) -> Path:
    """A small synthesised corpus: directories `train` and `test` in LibriSpeech's layout."""
    from synthetic_speech.corpus import make_corpus

    directory = tmp_path_factory.mktemp("synthetic")
    make_corpus(directory, train_utterances=48, test_utterances=12)
    return directory


@pytest.fixture(scope="session")
def dev_speech(request) -> Path:
    """A LibriSpeech-layout directory: real speech where it lies beside the checkout, else synthesised."""
    real = SHARED_DATA / "LibriSpeech" / "dev-mini"
    return real if real.is_dir() else request.getfixturevalue("synthetic_corpus") / "test"


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """Shards and settings for trainings that take a second; see tests/tiny_training.py."""
    from tests.tiny_training import make_corpus

    os.environ["TINY_TRAINING_LOGS"] = str(tmp_path_factory.mktemp("ranks"))
    return make_corpus(tmp_path_factory.mktemp("tiny"))
