"""Noises and rooms from real shards: packed without transcripts, read by stretches, mixed in on any number of ranks."""

import dataclasses
import json
import re
import shutil

import pytest
import soundfile

from ddp_asr.config import Augment, Background, Config, Data, Room
from ddp_asr.data.clips import open_clips, read_clips
from ddp_asr.data.index import read_index
from ddp_asr.errors import UserError
from ddp_asr.shard import main
from ddp_asr.train import main as train_main
from tests import tiny_speech
from tests import tiny_training as tiny

PURPOSES = ["pitch", "room", "background", "noise", "volume"]


def settings(*noise, rooms=()):
    augment = Augment(background=Background(share=1.0), room=Room(share=float(bool(rooms))))
    return Config(data=Data(noise=list(map(str, noise)), rooms=list(map(str, rooms))), augment=augment)


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """Two directories of noises, and their shards."""
    root, shards = tmp_path_factory.mktemp("noises"), []
    for number, name in enumerate(("street", "cafe")):
        (root / name / "a").mkdir(parents=True)
        for n in range(3):
            recording = tiny_speech.noise(0.5 + n, seed=10 * number + n)
            soundfile.write(root / name / "a" / f"{name}-{n}.wav", recording, 16_000)
        shards.append(tiny_speech.shard(root / name, root / "shards" / name, "--no-text"))
    return root, shards


def test_recordings_without_transcripts_are_packed_and_verified(noises):
    _, (street, _) = noises
    index = read_index([street])
    assert index.keys.to_pylist() == ["a_street-0", "a_street-1", "a_street-2"]
    assert index.texts.to_pylist() == [""] * 3 and index.samples.tolist() == [8_000, 24_000, 40_000]
    assert json.loads((street / "dataset.json").read_text())["source"]["kind"] == "recordings"
    assert main(["--verify", "--out", str(street)]) == 0


def test_a_stretch_is_that_of_the_recording_whatever_the_order_of_the_directories(noises):
    root, (street, cafe) = noises
    for directories in ((street, cafe), (cafe, street)):
        clips = open_clips(read_clips(settings(*directories)))["background"]
        assert clips.samples.tolist() == [8_000, 24_000, 40_000] * 2
        for number, (name, n) in enumerate((name, n) for name in ("cafe", "street") for n in range(3)):
            recording = soundfile.read(root / name / "a" / f"{name}-{n}.wav", dtype="int16")[0]
            for first, samples in ((0, len(recording)), (1, 1), (len(recording) - 7, 7), (5_000, 3_000)):
                assert (clips.read(number, first, samples) == recording[first : first + samples]).all()


def test_only_the_recordings_that_are_used_are_read(noises):
    _, (street, _) = noises
    unused = settings(street, rooms=["/nowhere"])
    assert list(read_clips(dataclasses.replace(unused, augment=Augment()))) == []
    with pytest.raises(UserError, match="/nowhere: no such shard directory"):
        read_clips(unused)


def test_a_recording_that_no_longer_decodes_is_named(noises, tmp_path):
    root, _ = noises
    out = tiny_speech.shard(root / "cafe", tmp_path / "damaged", "--no-text")
    index = read_index([out])
    data = bytearray((out / "shard-000000.tar").read_bytes())
    data[index.offset[1] + 10_000] ^= 1
    (out / "shard-000000.tar").write_bytes(data)
    clips = open_clips(read_clips(settings(out)))["background"]
    assert len(clips.read(0, 0, 100)) == 100
    with pytest.raises(UserError, match=r"the recording a_cafe-1 in .*\.tar, .* cannot be read \(does not dec"):
        clips.read(1, 0, 24_000)


def test_a_dry_run_says_what_is_mixed_in_and_what_is_missing(tiny_corpus, tmp_path, capsys):
    mixed = tiny.mixing(tmp_path)
    assert train_main([*tiny_corpus.arguments(tmp_path, "run", *mixed), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nbackground +5 recordings, 0.00 h, for 50% of the utterances\nroom +4 recordings, ", said)
    shutil.rmtree(tmp_path / "shards" / "noise")
    with pytest.raises(
        UserError, match=r"there are no shards at .*noise; make(.|\n)*shard SOURCE --out .*/noise --no-text"
    ):
        train_main([*tiny_corpus.arguments(tmp_path, "run", *mixed), "--dry-run"])


# ---- whole trainings -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return tiny.mixing(tmp_path_factory.mktemp("mixed"))


def test_a_run_says_how_often_each_augmentation_fired(tiny_corpus, mixed, tmp_path):
    output = tiny.train(tiny_corpus.arguments(tmp_path, "run", *mixed))
    epochs = [line for line in tiny.metrics(tmp_path / "run") if line["kind"] == "epoch"]
    for line in epochs:
        assert [name for name in line["fired"] if name in PURPOSES] == PURPOSES
    for purpose in PURPOSES:  # half of 3 x 26, give or take four standard deviations
        assert 21 <= sum(line["fired"][purpose] for line in epochs) <= 57
    assert "background in " in output
    cached = f"--data.cache_dir={tmp_path / 'cache'}"
    tiny.train(tiny_corpus.arguments(tmp_path, "with a cache", *mixed, cached))
    tiny.assert_same_run(tmp_path / "run", tmp_path / "with a cache")


def test_a_stop_is_invisible_and_other_noises_are_refused(tiny_corpus, mixed, tmp_path):
    tiny.train(tiny_corpus.arguments(tmp_path, "whole", *mixed))
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *mixed, "--train.stop_at_step=5"))
    others = tiny.mixing(tmp_path / "others")
    (tmp_path / "more").mkdir()
    soundfile.write(tmp_path / "more" / "new.flac", tiny_speech.noise(1.0), 16_000)
    more = tiny_speech.shard(tmp_path / "more", tmp_path / "more-shards", "--no-text")
    arguments = tiny_corpus.arguments(tmp_path, "run", *others, f"--data.noise={more}")
    said = tiny.start(arguments).fail()
    assert "was trained with other recordings for augment.background than those in" in said and str(more) in said
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *others))  # the same recordings in another place
    tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_noise_that_is_damaged_ends_the_run_in_one_sentence(tiny_corpus, tmp_path):
    mixed = tiny.mixing(tmp_path)
    shard = tmp_path / "shards" / "noise" / "shard-000000.tar"
    index, data = read_index([shard.parent]), bytearray(shard.read_bytes())
    for offset in index.offset.tolist():
        data[offset + 100 : offset + 200] = bytes(100)
    shard.write_bytes(data)
    said = tiny.start(tiny_corpus.arguments(tmp_path / "runs", "run", *mixed)).fail()
    assert "which is mixed into utterances, cannot be read" in said


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tiny_corpus, mixed, tmp_path):
    for processes in (1, 3):
        tiny.train(tiny_corpus.arguments(tmp_path, f"w{processes}", *mixed), processes, [tiny.in_double])
    tiny.assert_close_runs(tmp_path / "w3", tmp_path / "w1", 1e-9)
    plain = tiny_corpus.arguments(tmp_path, "plain", "--train.stop_at_step=1")
    tiny.train(plain, patches=[tiny.in_double])
    losses = [tiny.metrics(tmp_path / name)[0]["loss"] for name in ("w1", "plain")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)  # the augmentations did something
