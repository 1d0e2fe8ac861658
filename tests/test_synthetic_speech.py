"""The synthesised corpus: what the demo and many tests stand on."""

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from ddp_asr.errors import UserError
from synthetic_speech.corpus import TEST_SPEAKERS, TRAIN_SPEAKERS, chapters, make_corpus, read_transcripts, sentences
from tests.conftest import REPOSITORY


def test_speakers_and_sentences_of_train_and_test_are_disjoint(tmp_path):
    plan = chapters(tmp_path, train_utterances=1200, test_utterances=80)
    said = {name: set() for name in ("train", "test")}
    for chapter in plan:
        said[chapter.directory.relative_to(tmp_path).parts[0]].update(chapter.sentences)
    assert len(said["train"]) == 1200 and len(said["test"]) == 80
    assert not said["train"] & said["test"]
    assert not {s.voice for s in TRAIN_SPEAKERS} & {s.voice for s in TEST_SPEAKERS}
    assert len({s.name for s in TRAIN_SPEAKERS + TEST_SPEAKERS}) == len(TRAIN_SPEAKERS + TEST_SPEAKERS)
    words = {name: set(" ".join(texts).split()) for name, texts in said.items()}
    assert words["test"] <= words["train"]  # new sentences of known words


def test_the_alphabet_is_the_recipes_own():
    text = "".join(itertools.islice(sentences("any"), 500))
    assert set(text) <= set(" abcdefghijklmnopqrstuvwxyz")


def test_every_utterance_is_sound_speech(synthetic_corpus):
    for name, number in (("train", 48), ("test", 12)):
        texts = read_transcripts(synthetic_corpus / name)
        assert len(texts) == number
        assert set(texts) == set((synthetic_corpus / name).rglob("*.flac"))
        for audio, text in texts.items():
            info = soundfile.info(audio)
            assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
            wave, _ = soundfile.read(audio, dtype="float64")
            assert 0.8 < len(wave) / 16_000 < 5
            assert 10 ** (-13 / 20) < np.abs(wave).max() < 10 ** (-1.5 / 20)  # neither faint nor clipped
            assert np.abs(wave[:800]).max() < 0.1 * np.abs(wave).max()  # begins in silence ...
            assert wave.std() > 0.01  # ... and is not all of it
            # CTC needs a frame a letter and one between equal ones; 25 frames/s is the least that we train at.
            repeats = sum(a == b for a, b in itertools.pairwise(text))
            assert len(text) + repeats < 0.9 * 25 * len(wave) / 16_000, text


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_number_of_processes(synthetic_corpus, tmp_path):
    assert make_corpus(tmp_path / "again", train_utterances=48, test_utterances=12, workers=1)
    digests = [
        {file.relative_to(top): hashlib.sha256(file.read_bytes()).digest() for file in top.rglob("*") if file.is_file()}
        for top in (synthetic_corpus, tmp_path / "again")
    ]
    assert digests[0] == digests[1]


def test_a_complete_corpus_is_left_alone_and_another_directory_is_refused(synthetic_corpus, tmp_path):
    assert make_corpus(synthetic_corpus, train_utterances=48, test_utterances=12) is False
    with pytest.raises(UserError, match="something else"):
        make_corpus(synthetic_corpus, train_utterances=47, test_utterances=12)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="--out"):
        make_corpus(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_the_example_is_an_utterance_and_its_text(synthetic_corpus):
    command = [sys.executable, "-m", "synthetic_speech", "--out", str(synthetic_corpus), "--example"]
    command += ["--train-utterances=48", "--test-utterances=12"]
    audio, *words = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split()
    assert soundfile.info(audio).duration > 0.8
    assert words == " ".join(words).lower().split() and len(words) >= 3
