"""`--dry-run`: what it says of a tiny corpus is what a run would do, and costs neither audio nor a run directory."""

import re

import pytest
import soundfile
import torch

from ddp_asr import SAMPLE_RATE_HZ, train
from ddp_asr.config import config_from_dict
from ddp_asr.data.corpus import read_corpus
from ddp_asr.encoders import ENCODERS
from ddp_asr.errors import UserError
from ddp_asr.model import make_model
from ddp_asr.objective import ctc_loss
from ddp_asr.training.dry_run import activation_bytes_per_second, report
from tests import tiny_encoders
from tests.test_beam import write_arpa
from tests.tiny_speech import manifest, noise, shard

SECTIONS = {
    "vocabulary": {"symbols": " ab"},
    "batch": {"max_seconds": 2.0, "micro_batches": 4},
    "features": {"mel_bands": 16, "n_fft": 512},
    "augment": {"frequency_mask_bands": 4},
    "encoder": {"conv_channels": 4, "residual_blocks": 1, "rnn_layers": 2, "rnn_size": 8, "dropout": 0.2},
    "objective": {},
    "train": {"epochs": 3},
}
# 16 that can be trained; then a foreign character, too few frames for CTC, nothing left of it, too long.
TEXTS = ["ab ba"] * 16 + ["abc", "ab" * 40, "...", "ab"]
SECONDS = [0.5 + 0.02 * n for n in range(16)] + [0.5, 0.5, 0.5, 2.5]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dry-run")
    entries = []
    for number, (text, seconds) in enumerate(zip(TEXTS, SECONDS, strict=True)):
        soundfile.write(directory / f"{number:02d}.flac", noise(seconds, seed=number), SAMPLE_RATE_HZ)
        entries.append({"audio_filepath": f"{number:02d}.flac", "text": text})
    return shard(manifest(directory / "all.jsonl", entries), directory / "shards")


def settings(shards, **sections):
    data = {"train": [str(shards)], "test": []}
    vocabulary = {**SECTIONS["vocabulary"], "drop": "."}
    return config_from_dict({**SECTIONS, "vocabulary": vocabulary, "data": data, **sections}, "the test")


def test_it_names_steps_data_and_model(shards):
    config = settings(shards)
    text = report(config, world_size=2)
    corpus = read_corpus(config)
    steps = corpus.plan.steps_per_epoch
    assert f"steps             {steps} an epoch, {3 * steps} in all\n" in text
    assert "training data     16 utterances, 0.00 h\n" in text
    assert "test data         none\n" in text
    parameters = sum(p.numel() for p in make_model(config, 4).parameters())
    assert f"model             {parameters:,} parameters, 4 classes\n" in text
    assert "frames            40.0 a second of audio in the logits\n" in text  # a hop of 12.5 ms, a stride of 2
    assert "4 micro-batches, " in text and "up to 4; " in text
    assert "symbols: ' ab'" in text and "rnn_size: 8" in text  # every setting, as it would be saved


def test_it_names_what_is_left_out_and_why(shards):
    counts = read_corpus(settings(shards)).targets.counts()
    assert sum(counts.values()) == 4 and len(counts) == 4
    text = report(settings(shards), world_size=1)
    assert "left out          4 of 20 utterances (20.0%) are left out\n" in text
    for reason, count in counts.items():
        assert re.search(rf"^ +{count}  {re.escape(reason)}$", text, re.MULTILINE)
    assert "'c' in 1 (such as 16)" in text
    assert "WARNING: 20.0% of the utterances will not be trained: " in text and "--vocabulary.symbols" in text


@pytest.mark.parametrize("kind", ENCODERS)
def test_it_names_those_with_too_few_frames_for_each_encoder(shards, kind):
    """At 20 frames a second 0.5 s have 10, too few for utterance 17 with 80 symbols alone."""
    sizes = tiny_encoders.SETTINGS[kind][0]
    config = settings(
        shards, encoder={"kind": kind, **sizes, "time_strides": [4]}, batch={"max_seconds": 9, "micro_batches": 1}
    )
    text = report(config, world_size=1)
    assert "frames            20.0 a second of audio in the logits\n" in text
    assert "too few frames    17\n" in text


def test_where_all_is_trained_it_says_so(shards):
    vocabulary = {"symbols": " abc.", "lowercase": True}
    clean = settings(
        shards,
        vocabulary=vocabulary,
        batch={"max_seconds": 10.0, "micro_batches": 2},
        features={"mel_bands": 16, "n_fft": 512, "hop_ms": 2.5},
    )
    assert "left out          nothing\n" in report(clean, world_size=1)


def test_more_processes_than_micro_batches_are_refused(shards):
    with pytest.raises(UserError, match="5 processes cannot share out 4 micro-batches"):
        report(settings(shards), world_size=5)
    report(settings(shards), world_size=4)


def test_what_a_run_would_refuse_is_refused(shards):
    with pytest.raises(UserError, match="16 usable utterances cannot fill the 17 micro-batches"):
        report(settings(shards, batch={"max_seconds": 2.0, "micro_batches": 17}), world_size=1)


def test_a_decoder_that_cannot_be_made_is_refused(shards, tmp_path):
    (tmp_path / "hot.txt").write_text("abba\nabc\n")
    words = write_arpa(tmp_path / "words.arpa", ["AN", "APPLE"])
    for decoder, said in (
        ({"lm": str(tmp_path / "none.arpa")}, r"none\.arpa cannot be read"),
        ({"lm": words}, "it is one of other symbols"),
        ({"hot_words": str(tmp_path / "hot.txt")}, r"hot\.txt, line 2: 'abc' cannot be recognised"),
    ):
        with pytest.raises(UserError, match=said):
            report(settings(shards, decoder={"kind": "beam", **decoder}), world_size=1)
    lm = write_arpa(tmp_path / "lm.arpa", ["a", "b", "<space>"])
    assert "kind: beam" in report(settings(shards, decoder={"kind": "beam", "lm": lm}), world_size=1)


def test_the_command_prints_it_and_leaves_nothing_behind(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = ["--dry-run", f"--data.train={shards}", "--data.test=", f"--run.dir={tmp_path / 'runs'}"]
    arguments += ["--vocabulary.symbols= ab", "--vocabulary.drop=.", "--batch.micro_batches=2", "--encoder.rnn_size=8"]
    with pytest.raises(UserError, match="3 processes cannot share out 2"):
        train.main(arguments)
    monkeypatch.delenv("WORLD_SIZE")
    assert train.main(arguments) == 0
    assert f"run               {tmp_path / 'runs'}/" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


# ---- memory --------------------------------------------------------------------------------------------------------


def kept_bytes(config, utterances, seconds):
    """What autograd really keeps of a micro-batch in training: each storage once, weights not counted."""
    model = make_model(config, 4)
    frames = config.features.frames(int(seconds * SAMPLE_RATE_HZ))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive, total = {}, 0

    def note(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | alive.keys():
            alive[storage.data_ptr()] = storage
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lengths = torch.full((utterances,), frames)
        seeds = torch.zeros(utterances, dtype=torch.int64)
        logits, left, _ = model(torch.zeros(utterances, frames, config.features.mel_bands), lengths, seeds=seeds)
        targets = torch.zeros(utterances, 4, dtype=torch.int64)
        ctc_loss(logits, left, targets, torch.full((utterances,), 4))
    return total


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_estimate_is_what_a_micro_batch_really_keeps(shards, kind):
    config = settings(shards, encoder={"kind": kind, "dropout": 0.2, **tiny_encoders.SETTINGS[kind][0]})
    model = make_model(config, 4)
    a_second = activation_bytes_per_second(config, model, "fp32")
    for utterances, seconds in ((1, 7.0), (6, 2.0), (10, 1.0)):
        estimate = a_second * utterances * seconds
        assert estimate == pytest.approx(kept_bytes(config, utterances, seconds), rel=0.1)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "section, changed, least, most",
    [
        ("encoder", {"conv_channels": 8}, 1.3, 2.0),
        ("encoder", {"rnn_layers": 8}, 2.0, 4.0),
        ("encoder", {"time_strides": [4]}, 0.5, 0.6),
        ("features", {"hop_ms": 25.0}, 0.48, 0.52),
        ("objective", {"consistency_weight": 0.2}, 1.99, 2.01),
    ],
    ids=str,
)
def test_the_estimate_scales_with_what_is_computed(shards, section, changed, least, most):
    before, after = (settings(shards, **{section: {**SECTIONS.get(section, {}), **more}}) for more in ({}, changed))
    one, other = (activation_bytes_per_second(c, make_model(c, 4), "fp32") for c in (before, after))
    assert least < other / one < most


def test_autocast_halves_most_of_what_is_kept(shards):
    config = settings(shards, encoder={"rnn_size": 64})
    model = make_model(config, 4)
    whole, half = (activation_bytes_per_second(config, model, precision) for precision in ("fp32", "bf16"))
    assert 0.45 < half / whole < 0.65


def test_the_memory_is_that_of_the_precision_and_of_what_runs_as_one_batch(shards):
    for section, world_size, said in [
        ({"precision": "auto"}, 1, ["estimate for bf16", "with 4 micro-batches as one batch"]),
        ({"precision": "fp32", "fuse_micro_batches": 3}, 1, ["estimate for fp32", "with 3 micro-batches as one batch"]),
        ({}, 3, ["with 2 micro-batches as one batch"]),
    ]:
        text = report(settings(shards, train=section), world_size)
        assert all(part in text for part in said)
    assert "as one batch" not in report(settings(shards), world_size=4)


def test_it_says_where_the_longest_are_alone(shards):
    alone = settings(shards, batch={"max_seconds": 1.5, "micro_batches": 4})
    assert re.search(r"^advice +\d+ utterances of up to 0.8 s are alone .* 1.6 would hold two$", report(alone, 1), re.M)
    assert "advice" not in report(settings(shards), world_size=1)


def test_the_largest_micro_batches_are_those_that_a_run_rehearses(shards):
    config = settings(shards)
    corpus = read_corpus(config)
    text = report(config, world_size=1)
    for name, rows in corpus.plan.largest_micro_batches(corpus.target_lengths).items():
        longest_s = corpus.index.samples[rows].max() / SAMPLE_RATE_HZ
        assert re.search(rf"^  {name} +{len(rows)} x {longest_s:.1f} s, about \d", text, re.MULTILINE)
