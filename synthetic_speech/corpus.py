"""A speech corpus in LibriSpeech's layout, synthesised; no network, no system package.

    grammar --sentences--> espeak-ng voices --22.05 kHz--> soxr --16 kHz, level--> OUT/train|test/SPEAKER/CHAPTER/*.flac

`python -m synthetic_speech --out OUT` makes OUT/train and OUT/test: other speakers and other sentences, so that a word
error rate on `test` is an honest one. The words are ones whose letters can be heard ("six red hens"), so that a small
network learns to spell them in minutes. The same files come from any number of processes: espeak-ng carries noise and
flutter from one utterance to the next, so each speaker is spoken from the beginning by a process of its own.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError

VERSION = 1  # of the corpus: raise it whenever other files come out
SILENT_EDGE_S = 0.1

# the grammar

COUNTS = ["six", "seven", "ten"]
LOOKS = ["red", "black", "big", "fat", "flat", "wet", "soft", "long", "thin", "glad", "strong", "hot"]
ANIMALS = ["cat", "dog", "cub", "pig", "hen", "rat", "bat", "frog", "duck", "crab"]
VERBS = ["sat", "ran", "hid", "slept", "swam", "jumped", "stood", "went", "fell", "spun"]
WHERE = ["on", "in", "at", "from", "under", "past"]
PLACES = ["bed", "tent", "hill", "pond", "bus", "ship", "bench", "rock", "box", "lamp", "desk", "mat", "log", "barn"]
CLOSINGS = ["fast", "at ten", "in spring", "at last", "in the sun"]


def sentence(draw: random.Random) -> str:
    """One sentence of three to nine words, such as `six wet frogs jumped from the log at last`."""
    count = draw.choice(["a", "the", *COUNTS])
    animal = draw.choice(ANIMALS) + ("s" if count in COUNTS else "")
    subject = [count, draw.choice(["", *LOOKS, *LOOKS]), animal, draw.choice(VERBS)]
    place = [draw.choice(WHERE), "the", draw.choice(PLACES)] if draw.random() < 0.8 else []
    closing = draw.choice(CLOSINGS) if draw.random() < 0.3 else ""
    return " ".join(word for word in [*subject, *place, closing] if word)


def sentences(seed: str) -> Iterator[str]:
    """Sentences without end, none twice."""
    draw = random.Random(seed)
    seen = set()
    while True:
        words = sentence(draw)
        if words not in seen:
            seen.add(words)
            yield words


# the speakers


@dataclass(frozen=True)
class Speaker:
    """A voice of espeak-ng, and how it is set."""

    name: str
    voice: str  # language+variant, as in `espeak-ng -v`
    pitch: int  # 0 to 99
    words_per_minute: int


@dataclass(frozen=True)
class Chapter:
    """All that one speaker says."""

    directory: Path
    speaker: Speaker
    sentences: tuple[str, ...]


def _speakers(first: int, voices: str) -> list[Speaker]:
    """`voices` are lines of voice, pitch and words a minute; LibriSpeech names its speakers by number."""
    rows = [line.split() for line in voices.strip().splitlines()]
    return [Speaker(str(first + n), voice, int(pitch), int(rate)) for n, (voice, pitch, rate) in enumerate(rows)]


# Only voices without breath: espeak-ng 1.52 makes breath from memory it never set, so it is other noise every time.
TRAIN_SPEAKERS = _speakers(
    1001,
    """
    en-us+m1        40 165
    en-us+m2        52 180
    en-us+m3        35 155
    en-us+m4        60 170
    en-us+m5        48 165
    en-us+m6        45 185
    en-us+m7        50 160
    en-us+f1        50 165
    en-us+f4        55 175
    en-us+Alex      48 170
    en-us+Andy      55 160
    en-us+Annie     45 175
    en-us+linda     52 165
    en-us+belinda   48 180
    en-us+Lee       45 170
    en-us+anika     50 150
    en-us+adam      42 170
    en-us+Mike      58 165
    en-us+Denis     50 175
    en-us+rob       38 160
    en-us+zac       52 170
    en-us+max       60 180
    en-us+Jacky     45 160
    en-us+Nguyen    50 175
    en-us+Tweaky    55 165
    en-us+benjamin  46 170
    en-us+boris     52 155
    en-us+david     56 180
    en-us+edward    44 165
    en-us+ian       50 170
    en-us+john      62 160
    en-us+norbert   40 175
    en-us+quincy    54 165
    en-us+robert    48 155
    en-us+steph     56 170
    en-us+travis    44 180
    en-gb-x-rp+m3   50 165
    en-gb-x-rp+f4   45 160
    en-gb-x-rp+Alex 55 170
    en-gb-x-rp+linda 40 175
    """,
)
TEST_SPEAKERS = _speakers(
    2001,
    """
    en-us+m8        46 165
    en-us+aunty     55 170
    en-us+Michael   54 160
    en-us+shelby    48 175
    """,
)


# the speech


class Espeak:
    """libespeak-ng through ctypes; one a process, since the library keeps its state in globals."""

    SYNCHRONOUS, DO_NOT_EXIT, UTF8, RATE, PITCH = 2, 0x8000, 1, 1, 3  # names of speak_lib.h

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError("espeakng-loader is not installed; `make install` does it") from None

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        # espeak-ng cuts the path of its data at 160 characters: a link keeps it short, wherever the package lies.
        self._home = tempfile.TemporaryDirectory()
        Path(self._home.name, "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
        home = self._home.name.encode()
        self.rate_hz = self._library.espeak_Initialize(self.SYNCHRONOUS, 0, home, self.DO_NOT_EXIT)
        if self.rate_hz <= 0:
            raise UserError(f"espeak-ng does not start with its data in {espeakng_loader.get_data_path()}")
        self._pieces: list[np.ndarray] = []
        # Held for life: ctypes frees a callback that nobody holds, and the library would call into nothing.
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, wave: "ctypes._Pointer[ctypes.c_short]", samples: int, _events: int | None) -> int:
        if wave and samples > 0:
            self._pieces.append(np.ctypeslib.as_array(wave, (samples,)).copy())
        return 0  # go on

    def choose(self, voice: str) -> None:
        """Takes a voice, which costs as much as a few sentences."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice!r}")

    def speak(self, text: str, pitch: int, words_per_minute: int) -> np.ndarray:
        """The int16 waveform of `text` at `rate_hz`."""
        self._library.espeak_SetParameter(self.RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(self.PITCH, pitch, 0)
        self._pieces = []
        data = text.encode()
        status = self._library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, self.UTF8, None, None)
        if status != 0 or not self._pieces:
            raise UserError(f"espeak-ng says nothing to {text!r} (status {status})")
        return np.concatenate(self._pieces)


def record(speech: np.ndarray, rate_hz: int, peak_db: float) -> np.ndarray:
    """`speech` with `SILENT_EDGE_S` of silence on either side, at 16 kHz, int16, with its peak at `peak_db`."""
    import soxr

    loud = np.flatnonzero(np.abs(speech.astype(np.int32)) > 0.01 * np.abs(speech.astype(np.int32)).max())
    edge = int(SILENT_EDGE_S * rate_hz)
    padded = np.pad(speech[loud[0] : loud[-1] + 1].astype(np.float32), edge)
    wave = soxr.resample(padded, rate_hz, SAMPLE_RATE_HZ)
    return np.round(wave * (32767 * 10 ** (peak_db / 20) / np.abs(wave).max())).astype(np.int16)


# the corpus


def write_chapter(chapter: Chapter) -> None:
    """Speaks a chapter; every utterance a little higher or lower, faster or slower, louder or softer than the last."""
    import soundfile

    espeak, speaker, draw = Espeak(), chapter.speaker, random.Random(chapter.speaker.name)
    espeak.choose(speaker.voice)
    chapter.directory.mkdir(parents=True)
    stem = f"{speaker.name}-{chapter.directory.name}"
    lines = []
    for number, words in enumerate(chapter.sentences):
        pitch = speaker.pitch + draw.randint(-10, 10)
        speech = espeak.speak(words, pitch, round(speaker.words_per_minute * draw.uniform(0.9, 1.1)))
        wave = record(speech, espeak.rate_hz, peak_db=draw.uniform(-12, -2))
        soundfile.write(chapter.directory / f"{stem}-{number:04d}.flac", wave, SAMPLE_RATE_HZ, subtype="PCM_16")
        lines.append(f"{stem}-{number:04d} {words.upper()}\n")
    (chapter.directory / f"{stem}.trans.txt").write_text("".join(lines), encoding="utf-8")


def chapters(directory: Path, train_utterances: int, test_utterances: int) -> list[Chapter]:
    """Who says what: every sentence once, so that no test sentence is trained, and speakers in turn."""
    unseen = sentences(f"corpus {VERSION}")
    plan = []
    for name, speakers, utterances in (
        ("test", TEST_SPEAKERS, test_utterances),
        ("train", TRAIN_SPEAKERS, train_utterances),
    ):
        texts = [next(unseen) for _ in range(utterances)]
        voices = speakers[: math.ceil(utterances / 4)]  # a process each: a small corpus has fewer
        for number, speaker in enumerate(voices):
            plan.append(Chapter(directory / name / speaker.name / "1", speaker, tuple(texts[number :: len(voices)])))
    return plan


def make_corpus(out: Path, train_utterances: int = 1200, test_utterances: int = 80, workers: int = 0) -> bool:
    """Makes OUT/train and OUT/test; False where they already are. `workers`: processes, 0 for one a core.

    Spoken aside and renamed, so a corpus that is there is complete, and two makers at once do each other no harm.
    """
    recipe = {"version": VERSION, "train_utterances": train_utterances, "test_utterances": test_utterances}
    if _is_made(out, recipe):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        corpus = Path(aside, "corpus")
        # Spawned and not forked: each speaker begins with a library that has said nothing yet.
        with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count(), maxtasksperchild=1) as pool:
            pool.map(write_chapter, chapters(corpus, train_utterances, test_utterances), chunksize=1)
        (corpus / "corpus.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
        try:
            corpus.rename(out)
        except OSError:
            if not _is_made(out, recipe):  # else another process was quicker, with the same files
                raise
    return True


def _is_made(out: Path, recipe: dict[str, int]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    made = out / "corpus.json"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == recipe:
        return True
    raise UserError(f"{out} holds something else than this corpus; name another directory with --out, or remove it")


def read_transcripts(split: Path) -> dict[Path, str]:
    """The audio files of a LibriSpeech-layout directory and their texts, in order."""
    texts = {}
    for transcript in sorted(split.glob("*/*/*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            key, _, text = line.partition(" ")
            texts[transcript.with_name(f"{key}.flac")] = text
    return texts


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m synthetic_speech",
        description="Synthesise a small speech corpus in LibriSpeech's layout: OUT/train and OUT/test.",
        epilog="Example: python -m synthetic_speech --out demo/corpus",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--train-utterances", type=int, default=1200, metavar="N", help="default: %(default)s")
    parser.add_argument("--test-utterances", type=int, default=80, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes; 0: one a core")
    parser.add_argument("--example", action="store_true", help="print one test utterance's path and text afterwards")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    out = arguments.out
    made = make_corpus(out, arguments.train_utterances, arguments.test_utterances, arguments.workers)
    if arguments.example:
        audio, text = next(iter(read_transcripts(out / "test").items()))
        print(audio, text.lower())
    else:
        number = arguments.train_utterances + arguments.test_utterances
        print(f"{out}: {number} utterances of {len(TRAIN_SPEAKERS) + len(TEST_SPEAKERS)} speakers", end=" ")
        print("spoken" if made else "were already there")
    return 0
