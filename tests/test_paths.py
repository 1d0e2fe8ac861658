"""Whatever lies at a path that a user names, a command ends with one sentence: no traceback, no wait without end."""

import ctypes
import errno
import importlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from ddp_asr import files
from ddp_asr.errors import UserError, run_entry_point, users_error
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY
from tests.tiny_recogniser import noises, write_checkpoint

LIMIT_S = 300  # far above what one takes; it is there for what never ends
MORE_BYTES = 4 << 30  # of address space, than this process has already


def loop(path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)
    return path


def below_a_file(path):
    path.write_text("a file")
    return path / "below"


def fifo(path):
    os.mkfifo(path)
    return path


def directory(path):
    path.mkdir()
    return path


def forbidden(path):
    path.mkdir(mode=0)
    return path / "below"


def device(path):
    path.symlink_to("/dev/zero")  # so that what replaces it, replaces a link
    return path


def text_file(path):
    path.write_text("neither audio nor settings")
    return path


HOSTILE = {
    "missing parent": lambda path: path / "below" / "that",
    "too long": lambda path: path.with_name("n" * 300),
    "a loop of links": loop,
    "below a file": below_a_file,
    "a named pipe": fifo,
    "a directory": directory,
    "a file": text_file,
    "a device": device,
    "forbidden": forbidden,
}

# PATH is the hostile one; the others are good.
COMMANDS = {
    "ddp_asr.shard": ["PATH --out OUT", "MANIFEST --out PATH", "SPLIT --out OUT --cache PATH", "--verify --out PATH"],
    "ddp_asr.inspect": ["PATH", "MANIFEST --config PATH", "MANIFEST --plot PATH"],
    "ddp_asr.train": [
        "--config PATH",
        "--config CONFIG --dry-run --resume PATH",
        "--config CONFIG --dry-run --data.train=PATH",
        "--config CONFIG --dry-run --data.test=PATH",
        "--config CONFIG --dry-run --run.dir=PATH",
        "--config CONFIG --dry-run --train.init_from=PATH",
        "--config CONFIG --dry-run --decoder.kind=beam --decoder.lm=PATH",
        "--config CONFIG --dry-run --decoder.kind=beam --decoder.hot_words=PATH",
        "--config CONFIG --dry-run --decoder.kind=lexicon --decoder.lexicon=PATH",
    ],
    "ddp_asr.evaluate": [
        "PATH SHARDS",
        "CHECKPOINT PATH",
        "CHECKPOINT SHARDS --out PATH",
        "CHECKPOINT SHARDS --decoder PATH",
    ],
    "ddp_asr.transcribe": ["PATH WAV", "CHECKPOINT PATH", "CHECKPOINT WAV --decoder PATH"],
    "ddp_asr.align": ["PATH WAV --text a", "CHECKPOINT PATH --text a", "CHECKPOINT WAV --text a --out PATH"],
    "ddp_asr.lm": [
        "PATH --config CONFIG --out OUT",
        "--run PATH --out OUT",
        "--config PATH --out OUT",
        "TEXT --config CONFIG --out PATH",
    ],
    "ddp_asr.tune": [
        "PATH SHARDS --lm LM --out OUT",
        "CHECKPOINT PATH --lm LM --out OUT",
        "CHECKPOINT SHARDS --lm PATH --out OUT",
        "CHECKPOINT SHARDS --lm LM --out PATH --lm-weights 1 --symbol-bonuses 1",
    ],
    "ddp_asr.tracking": ["PATH"],
    "launch.status": ["PATH"],
    "launch.submit": ["--config PATH --dry-run", "--config CONFIG --cluster PATH --dry-run"],
    "launch.sweep": ["PATH --dry-run"],
}
CASES = [(module, arguments) for module, several in COMMANDS.items() for arguments in several]


@pytest.fixture(scope="module")
def good(tiny_corpus, tmp_path_factory):
    """What the commands need beside the hostile path, where nobody may read it."""
    from ddp_asr import lm

    place = tmp_path_factory.mktemp("good")
    soundfile.write(place / "a.wav", noises(1.0), 16_000)
    (place / "a.txt").write_text("ab ba\nb a\n")
    config = tiny_corpus.directory / "tiny.yaml"
    (place / "tiny.yaml").write_text(
        config.read_text().replace("threads: 0", f"threads: 0, train: {tiny_corpus.train}, test: {tiny_corpus.test}")
    )
    run = place / "run"
    write_checkpoint(run / "best.pt")
    assert (
        lm.main([str(place / "a.txt"), "--config", str(config), "--order", "2", "--out", str(place / "lm.arpa")]) == 0
    )
    return {
        "CHECKPOINT": run / "best.pt",
        "SHARDS": tiny_corpus.test,
        "MANIFEST": tiny_corpus.directory / "test.jsonl",
        "SPLIT": "dev-clean",
        "CONFIG": place / "tiny.yaml",
        "WAV": place / "a.wav",
        "TEXT": place / "a.txt",
        "LM": place / "lm.arpa",
    }


@pytest.fixture
def in_bounds():
    def stop(*_):
        raise AssertionError(f"it waits without end, or for longer than {LIMIT_S} s")

    handler, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, limits[1]))
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, limits)


class Capabilities(ctypes.Structure):
    """What capget(2) and capset(2) take, in version 3: a header, and twice 32 bits of three sets."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int32), ("sets", ctypes.c_uint32 * 6))

    def call(self, name):
        header, sets = ctypes.byref(self), ctypes.byref(self, Capabilities.sets.offset)
        assert getattr(ctypes.CDLL(None, use_errno=True), name)(header, sets) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def as_anybody():
    """Without what root may do more than others: to read and write whatever the permissions say."""
    mine = Capabilities(version=0x20080522)
    mine.call("capget")
    effective = mine.sets[0]
    mine.sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    mine.call("capset")
    yield
    mine.sets[0] = effective
    mine.call("capset")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("module, arguments", CASES, ids=[f"{module} {arguments}" for module, arguments in CASES])
def test_a_command_ends_with_a_sentence_whatever_lies_there(
    good, in_bounds, as_anybody, tmp_path, capfd, module, arguments, kind
):
    path = HOSTILE[kind](tmp_path / "hostile")
    places = good | {"OUT": tmp_path / "out", "PATH": path}
    argv = [str(places.get(word, word)) for word in arguments.replace("=PATH", f"={path}").split(" ")]
    before = os.lstat(path) if kind in ("a named pipe", "a device") else None
    try:
        status = run_entry_point(lambda: importlib.import_module(module).main(argv))
    except SystemExit as error:  # argparse
        status = error.code
    out, err = capfd.readouterr()
    assert status in (0, 2), (status, out, err)
    if status == 2:
        assert len([line for line in err.splitlines() if "error: " in line]) == 1, err
    if before is not None:  # nothing took its place
        assert os.lstat(path).st_ino == before.st_ino


@pytest.mark.parametrize("kind", ["too long", "a loop of links", "below a file", "a named pipe", "a file"])
def test_a_run_directory_that_cannot_be_is_one_sentence_of_all_ranks(tiny_corpus, tmp_path, kind):
    path = HOSTILE[kind](tmp_path / "hostile")
    sentence = tiny.start(tiny_corpus.arguments(path), 2).fail()
    assert str(path) in sentence


def test_of_several_recordings_the_others_still_come(good, in_bounds, tmp_path, capfd):
    bad = [str(make(tmp_path / kind)) for kind, make in HOSTILE.items()]
    raw = tmp_path / "samples.RAW"
    raw.write_bytes(bytes(1000))
    argv = ["ddp_asr.transcribe", str(good["CHECKPOINT"]), *bad, str(raw), str(good["WAV"])]
    module = importlib.import_module(argv.pop(0))
    assert run_entry_point(lambda: module.main(argv)) == 2
    out, err = capfd.readouterr()
    assert out.startswith(f"{good['WAV']}\t") and out.count("\n") == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(bad) + 1 and "convert them to WAV" in errors[-1]


def test_a_recording_may_come_through_an_open_pipe(good, in_bounds):
    from ddp_asr.recognition.transcription import read_audio

    whole = read_audio(str(good["WAV"]))
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb") as file:
        file.write(Path(good["WAV"]).read_bytes()[:60_000])  # what a pipe holds
        file.close()
        heard = read_audio(f"/dev/fd/{reader}")
    assert len(heard) > 15_000 and (heard == whole[: len(heard)]).all()


def test_standard_input_may_be_closed(good):
    command = [sys.executable, "-m", "ddp_asr.transcribe", str(good["CHECKPOINT"]), "-"]
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    done = subprocess.run(closed, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cannot read stdin: it is closed; pipe a recording into it, or name a file\n"


# ---- the two places that all of this goes through ------------------------------------------------------------------


def test_what_is_open_already_can_be_read_and_a_name_for_it_cannot(tmp_path, in_bounds):
    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    with files.open_input(f"/dev/fd/{reader}") as file:
        assert file.read() == b"piped"
    os.close(reader)
    pipe = fifo(tmp_path / "pipe")
    both = os.open(pipe, os.O_RDWR)  # somebody writes to it, who may stop at any time
    for path in (pipe, f"/dev/fd/{both}", "/dev/zero", "/dev/tty", tmp_path):
        with pytest.raises(OSError):
            files.open_input(path)
    os.close(both)


@pytest.mark.parametrize("make", [fifo, device, directory])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make):
    path = make(tmp_path / "there")
    before = os.lstat(path)
    with pytest.raises(OSError):
        files.replace_file(path, "new")
    with pytest.raises(UserError, match=f"--out {path}"):
        files.check_writable(path)
    assert os.lstat(path) == before and [path] == list(tmp_path.iterdir())


def test_an_error_is_the_users_where_it_names_a_path_of_theirs(tmp_path, capsys):
    def at(*paths, number=errno.EACCES):
        return OSError(number, os.strerror(number), *paths)

    mine, ours = str(tmp_path / "mine"), str(Path(files.__file__).parent / "missing.yaml")
    assert (
        str(users_error(at(mine))) == f"{mine}: Permission denied; give yourself the permission, or name another path"
    )
    assert str(users_error(at("/aside", None, mine))).startswith(f"{mine}: ")  # of a rename
    assert str(users_error(at(mine.encode(), number=errno.ELOOP))).endswith(
        "levels of symbolic links; name another path"
    )
    for error in (OSError("ours"), OSError(errno.EBADF, "Bad file descriptor"), at(7), at(ours), at(os.__file__)):
        assert users_error(error) is None
        with pytest.raises(OSError):
            run_entry_point(lambda error=error: raised(error))
    assert run_entry_point(lambda: raised(at(mine))) == 2
    assert capsys.readouterr().err.startswith(f"error: {mine}: ")


def raised(error):
    raise error


def test_developers_see_the_traceback_in_pythons_development_mode(tmp_path):
    program = (
        f"from ddp_asr.errors import run_entry_point; run_entry_point(lambda: open({str(tmp_path / 'x')!r}).close())"
    )
    for options, expected in ((), "error: "), (("-X", "dev"), "Traceback"):
        command = [sys.executable, *options, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        assert done.stderr.startswith(expected)


def test_every_rank_raises_the_error_at_a_path_of_any(tmp_path):
    from ddp_asr.ranks.world import World

    world = World(0, 1, 0, torch.device("cpu"))
    for run in (world.run_on_all, world.run_on_rank_zero):
        with pytest.raises(UserError, match="missing: No such file or directory; name a path that exists"):
            run((tmp_path / "missing").read_bytes)
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 / 0)
