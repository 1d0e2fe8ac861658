"""The loader carries a plan out: the same bits from any worker and any position, whatever a shard has suffered."""

import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal

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
from ddp_asr.features import masks as augment
from ddp_asr.text.characters import Characters

TOKENISER = Characters("' abcdefghijklmnopqrstuvwxyz")
CONFIG = Config(
    data=Data(workers=0, prefetch=2),
    batch=Batch(max_seconds=6.0, micro_batches=3, buckets=4),
    augment=Augment(speeds=[0.9, 1.0, 1.1], noise=Noise(share=0.5)),
    train=Train(epochs=2),
)
PLAIN = dataclasses.replace(CONFIG, augment=Augment(frequency_masks=0, time_masks=0))


def with_workers(config, workers):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))


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
    return loader.train_loader(
        whole, TOKENISER, plan, augment.draw, config, rank=rank, world_size=world_size, **options
    )


def content(batch):
    """Everything that a training step can see of a micro-batch."""
    tensors = (batch.waveforms, batch.samples, batch.targets, batch.target_lengths, batch.weight, batch.rows)
    masks = [(name, mask.tolist()) for name, mask in (batch.masks or {}).items()]
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


def test_worker_processes_change_nothing(whole):
    alone = [content(batch) for batch in train(whole, CONFIG)]
    assert alone == [content(batch) for batch in train(whole, with_workers(CONFIG, 2))]
    assert [position for position, *_ in alone] == sorted(position for position, *_ in alone)


def test_a_start_at_any_position_is_the_rest(whole):
    everything = [content(batch) for batch in train(whole, CONFIG, 1, 2)]
    per_step = 2  # of the three micro-batches of a step, the second rank of two has two
    steps = len(everything) // per_step // 2
    for epoch, step in [(0, 1), (0, steps - 1), (0, steps), (1, 0), (1, 2), (2, 0)]:
        rest = [content(batch) for batch in train(whole, CONFIG, 1, 2, start=(epoch, step))]
        assert rest == everything[(epoch * steps + step) * per_step :]


def test_workers_live_through_all_epochs(whole):
    batches = train(whole, with_workers(CONFIG, 1))
    first = next(batches)
    workers = {process.pid for process in multiprocessing.active_children()}
    last = first
    for last in itertools.islice(batches, len(whole)):
        if last.epoch == 1:
            break
    assert last.epoch == 1 and workers == {process.pid for process in multiprocessing.active_children()}
    batches.close()
    assert not workers & {process.pid for process in multiprocessing.active_children()}


def test_speed_changes_length_and_pitch_by_the_plans_arithmetic(tmp_path):
    tone = (8_000 * np.sin(2 * np.pi * 1_000 * np.arange(16_001) / 16_000)).astype(np.int16)
    whole = index_of_flacs(tmp_path, [flac(tone)], [len(tone)])
    recordings = loader.Recordings(whole, TOKENISER, PLAIN, draw_masks=None, training=True)
    for speed in (0.9, 1.1, 1.2345):
        batch = recordings[loader.Work(0, 0, 0, np.array([0]), np.array([speed]))]
        assert batch.samples.tolist() == [speed_samples(whole.samples, speed)[0]] == [round(16_001 / speed)]
        spectrum = np.abs(np.fft.rfft(batch.waveforms[0].numpy().astype(float)))
        assert np.argmax(spectrum) / len(batch.waveforms[0]) * 16_000 == pytest.approx(1_000 * speed, abs=1.0)
        assert np.abs(batch.waveforms[0].numpy()[-400:]).max() > 4_000  # not cut off, and no silence put in its place


def test_noise_is_as_loud_and_as_frequent_as_the_settings_say(whole):
    noisy = dataclasses.replace(PLAIN, augment=Augment(noise=Noise(0.5, 10.0, 20.0)))
    ratios_db = []
    for clean, dirty in zip(train(whole, PLAIN), train(whole, noisy), strict=True):
        for i, samples in enumerate(clean.samples.tolist()):
            speech = clean.waveforms[i, :samples].double()
            noise = dirty.waveforms[i, :samples].double() - speech
            assert not dirty.waveforms[i, samples:].any()
            if noise.any():
                ratios_db.append(float(10 * torch.log10(speech.square().mean() / noise.square().mean())))
    assert 0.3 < len(ratios_db) / (2 * len(whole)) < 0.7
    assert 9.5 < min(ratios_db) < 13 and 17 < max(ratios_db) < 20.5


# damaged shards


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
    recordings = loader.Recordings(whole, TOKENISER, CONFIG, draw_masks=augment.draw, training=True)
    batch = recordings[loader.Work(0, 0, 0, np.array([1, 0, 2]))]
    assert batch.keys == ["key-1", "key-2"] and batch.rows.tolist() == [1, 2] and batch.utterances == 2
    ((key, why),) = batch.bad
    assert key == "key-0" and re.search(reason, why) and "\n" not in why
    assert {len(tensor) for tensor in [batch.waveforms, batch.targets, batch.weight, *batch.masks.values()]} == {2}
    short = recordings[loader.Work(0, 0, 0, np.array([0, 2]))]
    assert short.waveforms.shape == (1, 8_000)  # the dropped one's length is not padded to


def test_a_recording_that_ends_early_is_dropped_and_named(tmp_path, monkeypatch):
    whole = index_of_flacs(tmp_path, [flac(SPEECH)], [9_000])
    recordings = loader.Recordings(whole, TOKENISER, PLAIN, draw_masks=None, training=True)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, out: out[:5])  # as libsndfile 1.0 does
    assert recordings[loader.Work(0, 0, 0, np.array([0]))].bad == [("key-0", "5 of 9000 samples decode")]


def test_an_emptied_micro_batch_carries_silence_of_no_weight(tmp_path):
    whole = index_of_flacs(tmp_path, [b"nothing", b"neither"], [9_000, 9_000])
    recordings = loader.Recordings(whole, TOKENISER, CONFIG, draw_masks=augment.draw, training=True)
    batch = recordings[loader.Work(0, 0, 0, np.array([0, 1]))]
    assert [key for key, _ in batch.bad] == ["key-0", "key-1"]
    assert (batch.weight.tolist(), batch.rows.tolist(), batch.keys) == ([0.0], [-1], [""])
    assert (batch.utterances, batch.audio_samples) == (0, 0)
    assert not batch.waveforms.any() and batch.waveforms.shape == (1, int(batch.samples[0]))
    assert batch.target_lengths.tolist() == [1] and all(len(mask) == 1 for mask in batch.masks.values())
    assert CONFIG.features.frames(int(batch.samples[0])) > 8


def test_a_shard_cut_short_or_gone_in_mid_run_is_a_reason(tmp_path):
    whole = index_of_flacs(tmp_path, [flac(SPEECH)] * 2, [9_000] * 2)
    os.truncate(whole.shards[0], int(whole.offset[1]) + 10)
    recordings = loader.Recordings(whole, TOKENISER, PLAIN, draw_masks=None, training=True)
    batch = recordings[loader.Work(0, 0, 0, np.array([0, 1]))]
    assert batch.keys == ["key-0"] and "ends at byte" in batch.bad[0][1]
    os.unlink(whole.shards[0])
    gone = loader.Recordings(whole, TOKENISER, PLAIN, draw_masks=None, training=True)
    assert "No such file" in gone[loader.Work(0, 0, 0, np.array([0]))].bad[0][1]


# evaluation


def test_an_evaluation_hears_everyone_once_in_batches_that_no_rank_changes(whole):
    alone = [content(batch) for batch in loader.eval_loader(whole, TOKENISER, CONFIG)]
    rows = [row for _, _, _, tensors, _ in alone for row in tensors[5]]
    assert sorted(rows) == list(range(len(whole)))
    for world_size in (2, 3, 16):
        ranks = [
            loader.eval_loader(whole, TOKENISER, CONFIG, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        everyones = [list(mine) for mine in ranks]
        assert {len(mine) for mine in everyones} == {mine.rounds for mine in ranks} == {-(-len(alone) // world_size)}
        in_turn = [batch for of_round in zip(*everyones, strict=True) for batch in of_round if batch is not None]
        assert [content(batch)[1:] for batch in in_turn] == [one[1:] for one in alone]


def test_an_evaluation_changes_no_waveform_and_leaves_nobody_out(whole):
    too_long = dataclasses.replace(CONFIG, batch=Batch(max_seconds=1.0))
    foreign = Characters(" abc")  # most transcripts have characters that it cannot spell
    batches = list(loader.eval_loader(whole, foreign, too_long))
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(len(whole)))
    for batch in batches:
        assert batch.masks is None and batch.weight.all()
        assert len(batch.rows) == 1 or batch.waveforms.numel() <= 16_000
        for i, row in enumerate(batch.rows.tolist()):
            assert (batch.waveforms[i, : batch.samples[i]].numpy() == audio(whole, row)).all()


# processes


def test_a_worker_that_is_killed_is_one_clear_error(whole):
    batches = train(whole, with_workers(dataclasses.replace(CONFIG, train=Train(epochs=1_000)), 1), epochs=1_000)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a loader process died \(SIGKILL\).*memory: lower data.workers"):
        for _ in batches:
            pass


def test_signals_that_ask_a_run_to_stop_do_not_reach_its_workers(whole):
    batches = train(whole, with_workers(CONFIG, 2))
    loaded = [next(batches)]
    for worker in multiprocessing.active_children():
        for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid, stop)
    loaded += batches
    assert [content(batch) for batch in loaded] == [content(batch) for batch in train(whole, CONFIG)]


def test_the_runs_random_state_and_signal_handlers_are_left_alone(whole):
    torch.manual_seed(0)
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    batches = train(whole, with_workers(CONFIG, 1))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    batches.close()
    assert (torch.get_rng_state() == before).all()


def test_an_error_of_ours_in_a_worker_keeps_its_traceback(whole):
    broken = dataclasses.replace(whole, texts=whole.texts.slice(0, 1))
    with pytest.raises(IndexError, match="Original Traceback"):
        list(train(broken, with_workers(CONFIG, 1)))


def test_an_index_of_another_plan_is_refused(whole):
    plan = Plan(whole.samples, whole.key_hash, settings=CONFIG.batch)
    with pytest.raises(ValueError, match="does not belong"):
        loader.train_loader(whole.take([0]), TOKENISER, plan, None, CONFIG, rank=0, world_size=1)


def test_more_processes_than_micro_batches_are_refused_at_once(whole):
    with pytest.raises(UserError, match="start at most 3"):
        train(whole, CONFIG, rank=3, world_size=4)


def test_a_micro_batch_moves_whole(whole):
    batch = next(train(whole, CONFIG))
    moved = batch.to("meta")
    tensors = [moved.waveforms, moved.samples, moved.targets, moved.weight, moved.rows, *moved.masks.values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
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
def test_closing_what_is_on_the_device_ends_the_workers(whole, device):
    batches = loader.on_device(train(whole, with_workers(CONFIG, 1)), torch.device(device))
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.gpu
def test_pinned_micro_batches_arrive_on_the_device_as_they_were(whole):
    device = torch.device("cuda")
    there = loader.on_device(train(whole, with_workers(CONFIG, 2), pin_memory=True), device)
    for expected, batch in zip(train(whole, CONFIG, pin_memory=False), there, strict=True):
        assert batch.waveforms.is_cuda and content(batch) == content(expected)


def test_node_local_copies_are_read_the_same(whole, tmp_path):
    cached = storage.cache_shards(whole, tmp_path)
    assert cached.shards != whole.shards
    assert [content(b) for b in train(cached, CONFIG)] == [content(b) for b in train(whole, CONFIG)]
