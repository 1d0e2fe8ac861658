"""The loader carries out a plan: the same bits from any thread and any position, also where shards are damaged."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import threading
import traceback

import numpy as np
import pyarrow
import pytest
import soundfile
import torch

from ddp_asr import shard
from ddp_asr.config import Augment, Batch, Config, Data, Noise, Train
from ddp_asr.data import index, loader, storage
from ddp_asr.data.plan import Plan, speed_samples
from ddp_asr.errors import UserError
from ddp_asr.text.characters import Characters

TOKENISER = Characters("' abcdefghijklmnopqrstuvwxyz")
CONFIG = Config(
    data=Data(threads=0, prefetch=2, test_max_seconds=6.0),
    batch=Batch(max_seconds=6.0, micro_batches=3, buckets=4),
    augment=Augment(speeds=[0.9, 1.0, 1.1], noise=Noise(share=0.5)),
    train=Train(epochs=2),
)
PLAIN = dataclasses.replace(CONFIG, augment=Augment(frequency_masks=0, time_masks=0))


def with_threads(config, threads, prefetch=2):
    return dataclasses.replace(config, data=Data(threads=threads, prefetch=prefetch))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """40 recordings of noise that swells, 0.3 to 2.5 s, in a handful of shards, each with a transcript of its own."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("shards") / "mine"
    generator, lines = np.random.default_rng(0), []
    for number in range(40):
        samples = int(generator.integers(4_800, 40_000))
        swelling = generator.normal(size=samples) * np.linspace(0, 3_000, samples)
        soundfile.write(source / f"{number}.flac", swelling.astype(np.int16), 16_000)
        text = f"number {'abcdefghijklmnopqrstuvwxyz'[number % 26]} of {'many' * (number % 2)}"
        lines.append(json.dumps({"audio_filepath": f"{number}.flac", "text": text, "id": f"noise-{number}"}))
    (source / "manifest.jsonl").write_text("\n".join(lines))
    assert shard.main([str(source / "manifest.jsonl"), "--out", str(out), "--shard-mb", "0.5", "--workers", "1"]) == 0
    return out


@pytest.fixture
def whole(shards):
    return index.read_index([shards])


def train(whole, config, rank=0, world_size=1, **options):
    plan = Plan(
        whole.samples, whole.key_hash, settings=config.batch, speeds=config.augment.speeds, seed=config.train.seed
    )
    return loader.train_loader(whole, TOKENISER, plan, config, rank=rank, world_size=world_size, **options)


def content(batch):
    """Everything that a training step can see of a micro-batch."""
    tensors = (batch.waveforms, batch.samples, batch.targets, batch.target_lengths, batch.weight, batch.rows)
    drawn = {} if batch.masks is None else {**batch.masks, "dropout": batch.dropout_seeds}
    masks = [(name, numbers.tolist()) for name, numbers in drawn.items()]
    position = (batch.epoch, batch.step, batch.micro_batch)
    return position, batch.keys, batch.bad, [tensor.tolist() for tensor in tensors], masks


def audio(whole, row):
    with open(whole.shards[whole.shard[row]], "rb") as tar:
        tar.seek(whole.offset[row])
        return soundfile.read(io.BytesIO(tar.read(whole.bytes[row])), dtype="int16")[0]


def test_a_micro_batch_is_its_utterances_padded_with_zeros(whole):
    batch = next(train(whole, PLAIN))
    assert batch.utterances == len(batch.keys) == len(batch.rows) > 1
    for i, row in enumerate(batch.rows.tolist()):
        expected = audio(whole, row)
        assert batch.samples[i] == len(expected) == whole.samples[row]
        assert (batch.waveforms[i, : len(expected)].numpy() == expected).all()
        assert not batch.waveforms[i, len(expected) :].any()
        target = TOKENISER.encode(whole.text(row))
        assert batch.targets[i, : batch.target_lengths[i]].tolist() == target.tolist()
        assert not batch.targets[i, batch.target_lengths[i] :].any()
        assert batch.keys[i] == whole.key(row)
    assert batch.audio_samples == batch.samples.sum() and batch.weight.tolist() == [1.0] * len(batch.keys)
    assert batch.waveforms.dtype == torch.int16


def test_all_ranks_together_load_every_utterance_once_an_epoch(whole):
    for world_size in (1, 2, 3):
        batches = [b for rank in range(world_size) for b in train(whole, CONFIG, rank, world_size)]
        for epoch in range(2):
            keys = [key for batch in batches for key in batch.keys if batch.epoch == epoch]
            assert sorted(keys) == sorted(whole.keys.to_pylist())


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (2, 1), (2, 2), (5, 3), (3, 1_000)])
def test_threads_change_nothing(whole, threads, prefetch):
    alone = [content(batch) for batch in train(whole, CONFIG)]
    assert alone == [content(batch) for batch in train(whole, with_threads(CONFIG, threads, prefetch))]
    assert [position for position, *_ in alone] == sorted(position for position, *_ in alone)


def in_one(batches):
    """The content of several micro-batches as one batch, padded to the longest."""

    def padded(rows):
        return [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]

    contents = [content(batch) for batch in batches]
    waveforms, samples, targets, *more = [
        [row for *_, tensors, _ in contents for row in tensors[number]] for number in range(6)
    ]
    names = [name for name, _ in contents[0][-1]]
    masks = [(name, [row for *_, drawn in contents for row in dict(drawn)[name]]) for name in names]
    keys = [key for batch in batches for key in batch.keys]
    return contents[0][0], keys, [], [padded(waveforms), samples, padded(targets), *more], masks


@pytest.mark.parametrize("fuse, world_size", [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3)])
def test_a_fused_batch_is_its_micro_batches_end_to_end(whole, fuse, world_size):
    """Of one step only: where they do not come out even, the last batch of a step stands for fewer."""
    for rank in range(world_size):
        alone, fused = list(train(whole, CONFIG, rank, world_size)), train(whole, CONFIG, rank, world_size, fuse=fuse)
        while alone:
            batch = next(fused)
            left = sum((one.epoch, one.step) == (batch.epoch, batch.step) for one in alone)
            assert batch.micro_batches == min(fuse, left)
            ours, alone = alone[: batch.micro_batches], alone[batch.micro_batches :]
            assert content(batch) == in_one(ours)
            assert batch.utterances == sum(one.utterances for one in ours)
            assert batch.audio_samples == sum(one.audio_samples for one in ours)
        assert next(fused, None) is None


def test_fused_batches_start_at_any_step_and_threads_change_nothing(whole):
    everything = [content(batch) for batch in train(whole, CONFIG, fuse=2)]
    threaded = train(whole, with_threads(CONFIG, 2, prefetch=4), fuse=2, start=(0, 2))
    assert [content(batch) for batch in threaded] == everything[2 * 2 :]  # of three micro-batches two batches a step


def test_a_start_at_any_position_is_the_rest(whole):
    everything = [content(batch) for batch in train(whole, CONFIG, 1, 2)]
    per_step = 2  # of the three micro-batches of a step, the second rank of two has two
    steps = len(everything) // per_step // 2
    for epoch, step in [(0, 1), (0, steps - 1), (0, steps), (1, 0), (1, 2), (2, 0)]:
        rest = [content(batch) for batch in train(whole, CONFIG, 1, 2, start=(epoch, step))]
        assert rest == everything[(epoch * steps + step) * per_step :]


def test_speed_changes_length_and_pitch_by_the_plans_arithmetic(tmp_path):
    tone = (8_000 * np.sin(2 * np.pi * 1_000 * np.arange(16_001) / 16_000)).astype(np.int16)
    whole = index_of_flacs(tmp_path, [flac(tone)], [len(tone)])
    speeds = [0.9, 1.1, 1.2345]
    settings = dataclasses.replace(PLAIN, augment=dataclasses.replace(PLAIN.augment, speeds=speeds))
    recordings = loader.Recordings(whole, TOKENISER, settings, training=True)
    for speed in speeds:
        batch = recordings.micro_batch(loader.Work(0, 0, 0, np.array([0]), np.array([speed])))
        assert batch.samples.tolist() == [speed_samples(whole.samples, speed)[0]] == [round(16_001 / speed)]
        spectrum = np.abs(np.fft.rfft(batch.waveforms[0].numpy().astype(float)))
        assert np.argmax(spectrum) / len(batch.waveforms[0]) * 16_000 == pytest.approx(1_000 * speed, abs=1.0)
        assert np.abs(batch.waveforms[0].numpy()[-400:]).max() > 4_000  # not cut off, and no silence put in its place


def test_augmentations_change_the_audio_of_their_utterances_and_no_padding(whole):
    noisy, changed = dataclasses.replace(PLAIN, augment=Augment(noise=Noise(share=0.5))), 0
    for clean, dirty in zip(train(whole, PLAIN), train(whole, noisy), strict=True):
        assert clean.samples.tolist() == dirty.samples.tolist()
        for i, samples in enumerate(clean.samples.tolist()):
            assert not dirty.waveforms[i, samples:].any()
            changed += bool((clean.waveforms[i] != dirty.waveforms[i]).any())
    assert 0.3 < changed / (2 * len(whole)) < 0.7


# damaged shards


def test_a_micro_batch_counts_the_utterances_that_each_augmentation_changed(whole):
    quiet = dataclasses.replace(CONFIG, augment=dataclasses.replace(CONFIG.augment, noise=Noise()))
    counted = dict.fromkeys(["speed 0.9", "speed 1.1", "noise", "frequency masks", "time masks"], 0)
    plan = Plan(whole.samples, whole.key_hash, settings=CONFIG.batch, speeds=CONFIG.augment.speeds)
    for batch, without in zip(train(whole, CONFIG, epochs=1), train(whole, quiet, epochs=1), strict=True):
        assert list(batch.fired) == list(counted) and list(without.fired) == [n for n in counted if n != "noise"]
        speeds = plan.epoch(0).speed[plan.epoch(0).span(batch.step, batch.micro_batch)]
        hidden = {name: (spans[:, :, 1] > spans[:, :, 0]).any(1).sum() for name, spans in batch.masks.items()}
        expected = {
            "speed 0.9": (speeds == 0.9).sum(),
            "speed 1.1": (speeds == 1.1).sum(),
            "noise": (batch.waveforms != without.waveforms).any(1).sum(),
            "frequency masks": hidden["frequency"],
            "time masks": hidden["time"],
        }
        assert batch.fired == expected
        counted = {name: counted[name] + count for name, count in batch.fired.items()}
    assert all(0 < count <= len(whole) for count in counted.values())
    (untouched, *_) = train(whole, PLAIN, epochs=1)
    assert untouched.fired == {}


def test_an_augmentation_that_changes_nothing_has_not_fired(whole):
    class Broken:
        purpose = "noise"

        def __call__(self, waveform, draw):
            return waveform.copy()

    recordings = loader.Recordings(whole, TOKENISER, CONFIG, training=True)
    recordings._augmentations = [Broken()]
    work = loader.Work(epoch=0, step=0, micro_batch=0, rows=np.arange(4), speed=np.ones(4))
    fired = recordings.micro_batch(work).fired
    assert (fired["noise"], fired["speed 0.9"]) == (0, 0) and fired["time masks"] > 0


def flac(samples, rate=16_000):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def index_of_flacs(directory, flacs, samples):
    """An index over one file of FLACs end to end; the loader reads byte ranges and asks for no tar."""
    path = directory / "shard-000000.tar"
    path.write_bytes(b"".join(flacs))
    sizes = np.array([len(one) for one in flacs], np.int64)
    keys = [f"key-{number}" for number in range(len(flacs))]
    return index.Index(
        shards=(str(path),),
        checksums=(hashlib.sha256(path.read_bytes()).hexdigest(),),
        shard=np.zeros(len(flacs), np.int32),
        offset=np.cumsum(sizes) - sizes,
        bytes=sizes,
        samples=np.array(samples, np.int64),
        keys=pyarrow.array(keys),
        texts=pyarrow.array(["a b"] * len(flacs)),
        speakers=pyarrow.array([""] * len(flacs)),
        key_hash=np.arange(len(flacs), dtype=np.uint64),
    )


SPEECH = (np.random.default_rng(1).normal(size=9_000) * 2_000).astype(np.int16)
DAMAGE = {
    "a flipped bit": (bytes(b ^ (i == 9_000) for i, b in enumerate(flac(SPEECH))), r"^does not decode: \w"),
    "another length": (flac(SPEECH[:-5]), r"\(16000, 1, 8995\), not \(16000, 1, 9000\)"),
    "another rate": (flac(SPEECH, 8_000), r"\(8000, 1, 9000\)"),
    "stereo": (flac(np.stack([SPEECH, SPEECH], 1)), r"\(16000, 2, 9000\)"),
    "cut short": (flac(SPEECH)[:-6_000], r"^does not decode: \w"),
    "no FLAC": (b"x" * 5_000, r"^does not decode: \w"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_recording_that_no_longer_decodes_is_dropped_and_named(tmp_path, damage):
    flacs, (damaged, reason) = [flac(SPEECH), flac(SPEECH[:8_000]), flac(SPEECH)], DAMAGE[damage]
    whole = index_of_flacs(tmp_path, [damaged, *flacs], [9_000, 9_000, 8_000, 9_000])
    recordings = loader.Recordings(whole, TOKENISER, CONFIG, training=True)
    batch = recordings.micro_batch(loader.Work(0, 0, 0, np.array([1, 0, 2])))
    assert batch.keys == ["key-1", "key-2"] and batch.rows.tolist() == [1, 2] and batch.utterances == 2
    ((key, why),) = batch.bad
    assert key == "key-0" and re.search(reason, why) and "\n" not in why
    assert {len(tensor) for tensor in [batch.waveforms, batch.targets, batch.weight, *batch.masks.values()]} == {2}
    short = recordings.micro_batch(loader.Work(0, 0, 0, np.array([0, 2])))
    assert short.waveforms.shape == (1, 8_000)  # the dropped one's length is not padded to


def test_no_flipped_bit_of_a_shard_is_heard(tmp_path):
    """Every frame of FLAC has a checksum, which costs nothing here: the recording is left out, or is the same."""
    good = flac(SPEECH[:2_000])
    flips = [(n, n % 8) for n in range(len(good))]
    flacs = [good[:n] + bytes([good[n] ^ 1 << bit]) + good[n + 1 :] for n, bit in flips]
    whole = index_of_flacs(tmp_path, flacs, [2_000] * len(flacs))
    batch = loader.Recordings(whole, TOKENISER, CONFIG, training=False).micro_batch(
        loader.Work(0, 0, 0, np.arange(len(flacs)))
    )
    assert len(batch.bad) > 0.9 * len(flacs)
    assert (batch.waveforms == torch.from_numpy(SPEECH[:2_000])).all()


def test_a_recording_that_ends_early_is_dropped_and_named(tmp_path, monkeypatch):
    whole = index_of_flacs(tmp_path, [flac(SPEECH)], [9_000])
    recordings = loader.Recordings(whole, TOKENISER, PLAIN, training=True)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, out: out[:5])  # as libsndfile 1.0 does
    assert recordings.micro_batch(loader.Work(0, 0, 0, np.array([0]))).bad == [("key-0", "5 of 9000 samples decode")]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_emptied_batch_carries_silence_of_no_weight(tmp_path, micro_batches):
    whole = index_of_flacs(tmp_path, [b"nothing", b"neither"], [9_000, 9_000])
    recordings = loader.Recordings(whole, TOKENISER, CONFIG, training=True)
    batch = recordings.micro_batch(loader.Work(0, 0, 0, np.array([0, 1]), micro_batches=micro_batches))
    assert batch.micro_batches == micro_batches
    assert [key for key, _ in batch.bad] == ["key-0", "key-1"]
    assert (batch.weight.tolist(), batch.rows.tolist(), batch.keys) == ([0.0], [-1], [""])
    assert (batch.utterances, batch.audio_samples) == (0, 0)
    assert batch.fired and not any(batch.fired.values())
    assert not batch.waveforms.any() and batch.waveforms.shape == (1, int(batch.samples[0]))
    assert batch.target_lengths.tolist() == [1] and all(len(mask) == 1 for mask in batch.masks.values())
    assert CONFIG.features.frames(int(batch.samples[0])) > 8


def test_a_shard_cut_short_or_gone_in_mid_run_is_a_reason(tmp_path):
    whole = index_of_flacs(tmp_path, [flac(SPEECH)] * 2, [9_000] * 2)
    os.truncate(whole.shards[0], int(whole.offset[1]) + 10)
    recordings = loader.Recordings(whole, TOKENISER, PLAIN, training=True)
    batch = recordings.micro_batch(loader.Work(0, 0, 0, np.array([0, 1])))
    assert batch.keys == ["key-0"] and "ends at byte" in batch.bad[0][1]
    os.unlink(whole.shards[0])
    gone = loader.Recordings(whole, TOKENISER, PLAIN, training=True)
    assert "No such file" in gone.micro_batch(loader.Work(0, 0, 0, np.array([0]))).bad[0][1]


# evaluation


def test_an_evaluation_hears_everyone_once_in_batches_that_no_rank_changes(whole):
    alone = [content(batch) for batch in loader.eval_loader(whole, TOKENISER, CONFIG)]
    rows = [row for _, _, _, tensors, _ in alone for row in tensors[5]]
    assert sorted(rows) == list(range(len(whole)))
    for world_size in (2, 3, 16):
        everyones = [
            list(loader.eval_loader(whole, TOKENISER, CONFIG, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert {len(mine) for mine in everyones} == {-(-len(alone) // world_size)}
        in_turn = [batch for of_round in zip(*everyones, strict=True) for batch in of_round if batch is not None]
        assert [content(batch)[1:] for batch in in_turn] == [one[1:] for one in alone]


def test_an_evaluation_changes_no_waveform_and_leaves_nobody_out(whole):
    too_long = dataclasses.replace(CONFIG, data=Data(threads=0, test_max_seconds=1.0))
    foreign = Characters(" abc")  # most transcripts have characters that it cannot spell
    batches = list(loader.eval_loader(whole, foreign, too_long))
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(len(whole)))
    for batch in batches:
        assert batch.masks is None and batch.weight.all()
        assert len(batch.rows) == 1 or batch.waveforms.numel() <= 16_000
        for i, row in enumerate(batch.rows.tolist()):
            assert (batch.waveforms[i, : batch.samples[i]].numpy() == audio(whole, row)).all()


# threads


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


def test_threads_live_through_all_epochs_and_end_with_the_iterator(whole):
    batches = train(whole, with_threads(CONFIG, 2))
    assert loader_threads() == []  # until the first micro-batch is asked for
    first = next(batches)
    threads = loader_threads()
    assert len(threads) == 2 and first.epoch == 0
    assert next(batch for batch in batches if batch.epoch == 1)
    assert loader_threads() == threads
    batches.close()
    assert loader_threads() == []
    list(train(whole, with_threads(CONFIG, 2)))
    assert loader_threads() == []


@pytest.mark.parametrize("fuse, most", [(1, 5), (2, 2), (3, 2)])
def test_no_more_is_decoded_ahead_than_the_setting_says(whole, monkeypatch, fuse, most):
    """Beside the batch that is handed out: `prefetch` counts micro-batches, and each thread has a batch in any case."""
    begun, used, micro_batch = itertools.count(1), 0, loader.Recordings.micro_batch
    most_ahead = 0

    def counted(self, work):
        nonlocal most_ahead
        most_ahead = max(most_ahead, next(begun) - used)
        return micro_batch(self, work)

    monkeypatch.setattr(loader.Recordings, "micro_batch", counted)
    for _ in train(whole, with_threads(CONFIG, 2, prefetch=5), fuse=fuse):
        used += 1
    assert most_ahead <= most + 1


def test_an_error_of_a_thread_is_raised_in_order_and_keeps_its_traceback(whole):
    """Where the seventh micro-batch would have been, after the six before it, although it was made ahead of them."""
    good = [content(batch) for batch in train(whole, CONFIG)]
    broken = dataclasses.replace(whole, texts=BrokenTexts(whole.texts, good[6][1][0], whole.keys))
    batches, loaded = train(broken, with_threads(CONFIG, 2, prefetch=20)), []
    with pytest.raises(ZeroDivisionError, match="one text is broken") as caught:
        for batch in batches:
            loaded.append(content(batch))
    assert loaded == good[:6]
    assert "_collate" in [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert loader_threads() == []


class BrokenTexts:
    """A column of texts, of which one cannot be read."""

    def __init__(self, texts, key, keys):
        self.texts, self.broken = texts, keys.to_pylist().index(key)

    def __getitem__(self, row):
        if row == self.broken:
            raise ZeroDivisionError("one text is broken")
        return self.texts[row]


def test_closing_does_not_wait_for_a_stuck_read(whole, monkeypatch):
    """A file system that hangs: the thread stays behind, asks for nothing more, and cannot keep the process alive."""
    read, stuck, go_on, asked = storage.LocalStore.read, threading.Event(), threading.Event(), []

    def hanging(self, name, offset, size):
        asked.append(offset)
        if len(asked) > 40:
            stuck.set()
            assert go_on.wait(60)
        return read(self, name, offset, size)

    monkeypatch.setattr(storage.LocalStore, "read", hanging)
    monkeypatch.setattr(loader, "_CLOSE_S", 0.0)
    batches = train(whole, with_threads(CONFIG, 1, prefetch=100))
    next(batches)
    assert stuck.wait(60)
    batches.close()
    (thread,) = loader_threads()
    assert thread.daemon
    go_on.set()
    thread.join(60)
    assert not thread.is_alive() and len(asked) < 40 + len(whole) // 3  # the rest of its micro-batch and no other


def test_the_runs_random_state_is_left_alone(whole):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(train(whole, with_threads(CONFIG, 1)))
    assert (torch.get_rng_state() == before).all()


def test_an_index_of_another_plan_is_refused(whole):
    plan = Plan(whole.samples, whole.key_hash, settings=CONFIG.batch)
    with pytest.raises(ValueError, match="does not belong"):
        loader.train_loader(whole.take([0]), TOKENISER, plan, CONFIG, rank=0, world_size=1)


def test_more_processes_than_micro_batches_are_refused_at_once(whole):
    with pytest.raises(UserError, match="start at most 3"):
        train(whole, CONFIG, rank=3, world_size=4)


def test_a_micro_batch_moves_but_for_its_lengths_and_rows(whole):
    batch = next(train(whole, CONFIG))
    moved = batch.to("meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    stay = {name for name, tensor in tensors.items() if tensor.device.type == "cpu"}
    assert stay == {"samples", "target_lengths", "rows"} and len(tensors) == 7
    assert all(mask.device.type == "meta" for mask in moved.masks.values())
    assert (moved.keys, moved.utterances) == (batch.keys, batch.utterances)


def test_the_next_micro_batch_is_sent_before_the_one_ahead_is_handed_out():
    events = []

    class Batch:
        def __init__(self, number):
            self.number = number

        def to(self, device, non_blocking):
            events.append(f"send {self.number}")
            assert non_blocking
            return self

    for batch in loader.on_device((Batch(number) for number in range(3)), torch.device("meta")):
        events.append(f"use {batch.number}")
    assert events == ["send 0", "send 1", "use 0", "send 2", "use 1", "use 2"]
    assert list(loader.on_device((word for word in ["as", "it", "is"]), torch.device("cpu"))) == ["as", "it", "is"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_closing_what_is_on_the_device_ends_the_threads(whole, device):
    batches = loader.on_device(train(whole, with_threads(CONFIG, 1)), torch.device(device))
    next(batches)
    assert loader_threads()
    batches.close()
    assert not loader_threads()


def test_threads_pin_memory_for_the_ranks_own_gpu(whole, monkeypatch):
    """A thread starts with GPU 0, whichever GPU its rank has."""
    devices, pinned = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((threading.current_thread(), device)))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(loader.MicroBatch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    batches = list(train(whole, with_threads(CONFIG, 2), pin_memory=True))
    assert len(batches) > 2 and {id(batch) for batch in batches} == {id(batch) for batch in pinned}
    assert [device for _, device in devices] == [3, 3] and threading.current_thread() not in dict(devices)


@pytest.mark.gpu
def test_pinned_micro_batches_arrive_on_the_device_as_they_were(whole):
    device = torch.device("cuda")
    there = loader.on_device(train(whole, with_threads(CONFIG, 2), pin_memory=True), device)
    for expected, batch in zip(train(whole, CONFIG, pin_memory=False), there, strict=True):
        assert batch.waveforms.is_cuda and content(batch) == content(expected)


def test_node_local_copies_are_read_the_same(whole, tmp_path):
    cached = storage.cache_shards(whole, tmp_path)
    assert cached.shards != whole.shards
    assert [content(b) for b in train(cached, CONFIG)] == [content(b) for b in train(whole, CONFIG)]
