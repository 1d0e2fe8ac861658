"""Evaluation of a tiny model with random weights over real shards, alone and in several processes."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ddp_asr import evaluate, shard
from ddp_asr.data.index import read_index
from ddp_asr.errors import UserError
from ddp_asr.recognition.evaluation import Recognised, Results, recognise, summarise
from ddp_asr.recognition.recogniser import load_recogniser, read_trained
from ddp_asr.runs import checkpoint
from tests.test_beam import write_arpa
from tests.tiny_recogniser import noises, tiny_state, write_checkpoint

UTTERANCES = 23
FOREIGN, CRAMMED = "utt-03", "utt-04"  # outside the alphabet; more symbols than frames
TIMES = ("wall_s", "real_time_factor")


def make_shards(directory: Path) -> Path:
    """Noises of 0.3 to 3 s with texts that have nothing to do with them."""
    random = np.random.default_rng(5)
    source = directory / "source"
    source.mkdir()
    lines = []
    for number in range(UTTERANCES):
        key = f"utt-{number:02d}"
        soundfile.write(source / f"{key}.flac", noises(float(random.uniform(0.3, 3.0)), seed=number), 16_000)
        text = " ".join("".join(random.choice(list("ab'"), size=random.integers(1, 5))) for _ in range(3))
        text = {FOREIGN: "A. ba xyz", CRAMMED: "ab " * 200}.get(key, text)
        lines.append(json.dumps({"audio_filepath": f"{key}.flac", "text": text, "id": key}))
    (source / "all.jsonl").write_text("\n".join(lines) + "\n")
    assert shard.main([str(source / "all.jsonl"), "--out", str(directory / "shards"), "--workers", "1"]) == 0
    return directory / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    state = tiny_state(data={"threads": 0, "test_max_seconds": 8.0})
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt", state)


@pytest.fixture(scope="module")
def alone(best, shards):
    """What is recognised in each utterance, one at a time, without any of the code under test."""
    from ddp_asr.objective import ctc_loss

    recogniser = load_recogniser(best)
    index = read_index([shards])
    found = {}
    for row in range(len(index)):
        waveform, _ = soundfile.read(shards.parent / "source" / f"{index.key(row)}.flac", dtype="int16")
        logits, frames = recogniser.logits(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
        reference = recogniser.tokeniser.normalise(index.text(row))
        loss = math.inf
        if index.key(row) not in (FOREIGN, CRAMMED):
            targets = torch.from_numpy(recogniser.tokeniser.encode(reference))[None].to(logits.device)
            loss = float(ctc_loss(logits, frames, targets, torch.tensor([targets.shape[1]], device=logits.device)))
        hypothesis = recogniser.decoder(logits, frames)[0].text
        found[index.key(row)] = Recognised(row, index.key(row), reference, hypothesis, loss)
    return found


def result(capsys, *arguments) -> dict:
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def numbers(facts: dict) -> dict:
    """All but what a clock says."""
    return {name: value for name, value in facts.items() if name not in TIMES}


def test_the_summary_is_that_of_utterances_heard_alone(best, shards, alone, capsys):
    facts = result(capsys, best, shards)
    expected = summarise(Results(list(alone.values())))
    assert len({utterance.hypothesis for utterance in alone.values()}) > UTTERANCES / 2  # a test of something
    assert facts["utterances"] == UTTERANCES
    assert facts["wer"] == expected.wer and facts["cer"] == expected.cer
    assert facts["words"] == sum(len(utterance.reference.split()) for utterance in alone.values())
    assert (
        facts["wer"]
        == (facts["word_substitutions"] + facts["word_deletions"] + facts["word_insertions"]) / (facts["words"])
    )
    assert facts["wer_interval"][0] < facts["wer"] < facts["wer_interval"][1]
    assert facts["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert facts["without_loss"] == 2
    assert (facts["step"], facts["epoch"], facts["bad_samples"]) == (7, 2, 0)
    assert facts["real_time_factor"] == pytest.approx(facts["wall_s"] / 3600 / facts["hours"])


def test_out_has_every_utterance_once_with_its_counts(best, shards, alone, tmp_path, capsys):
    facts = result(capsys, best, shards, "--out", tmp_path / "hyps.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "hyps.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [utterance.key for utterance in alone.values()]
    for line in lines:
        assert line["hypothesis"] == alone[line["key"]].hypothesis
        assert line["reference"] == alone[line["key"]].reference
    for name in ("words", "word_deletions", "char_substitutions"):
        assert sum(line[name] for line in lines) == facts[name]
    assert next(line["reference"] for line in lines if line["key"] == FOREIGN) == "a ba xyz"
    assert list(tmp_path.iterdir()) == [tmp_path / "hyps.jsonl"]


def test_batch_size_and_threads_change_nothing(best, shards, capsys):
    reference = numbers(result(capsys, best, shards))
    for options in (["--max-seconds", "3.1"], ["--max-seconds", "1000", "--threads", "1"]):
        other = numbers(result(capsys, best, shards, *options))
        assert other.pop("loss") == pytest.approx(reference["loss"], rel=1e-5)
        assert other == {name: value for name, value in reference.items() if name != "loss"}


def test_for_people(best, shards, alone, capsys):
    assert evaluate.main([str(best), str(shards), "--worst", "2"]) == 0
    shown = capsys.readouterr().out
    summary = summarise(Results(list(alone.values())))
    assert f"WER  {100 * summary.wer:6.2f} %" in shown
    assert f"{summary.counts.words} words: {summary.counts.word_substitutions} substituted" in shown
    assert "(2 utterances have none)" in shown
    assert "real-time factor" in shown
    assert f"  {CRAMMED}: " in shown  # 200 words, all wrong
    assert shown.count("    reference   ") == 2


def test_another_decoder_is_compared_with_greedy(best, shards, alone, tmp_path, capsys):
    (tmp_path / "decoder.yaml").write_text("decoder: {kind: beam, size: 4, symbol_bonus: 2, n_best: 2}")
    decoder = ["--decoder", tmp_path / "decoder.yaml"]
    greedy = result(capsys, best, shards)
    facts = result(capsys, best, shards, *decoder, "--out", tmp_path / "hyps.jsonl")
    assert "greedy_wer" not in greedy and greedy["decoder"] == {"kind": "greedy"}
    assert facts["decoder"]["symbol_bonus"] == 2.0
    assert (facts["greedy_wer"], facts["greedy_cer"]) == (greedy["wer"], greedy["cer"])
    assert facts["cer"] != greedy["cer"]
    low, high = facts["wer_difference_interval"]
    assert low <= facts["wer"] - greedy["wer"] <= high
    lines = [json.loads(line) for line in (tmp_path / "hyps.jsonl").read_text().splitlines()]
    assert [line["greedy"] for line in lines] == [utterance.hypothesis for utterance in alone.values()]
    of_two = [line for line in lines if "n_best" in line]  # the others differ in spaces only
    assert len(of_two) > UTTERANCES / 2
    for line in of_two:
        (text, score), (other_text, other_score) = line["n_best"]
        assert (text, score) == (line["hypothesis"], line["score"])
        assert text != other_text and other_score <= score
    other = result(capsys, best, shards, *decoder, "--max-seconds", "1000")
    assert {name: other[name] for name in ("wer", "cer", "greedy_wer")} == {
        name: facts[name] for name in ("wer", "cer", "greedy_wer")
    }
    assert evaluate.main([str(best), str(shards), "--decoder", str(tmp_path / "decoder.yaml")]) == 0
    assert f"greedy decoding of the same logits: WER {100 * greedy['wer']:.2f} %" in capsys.readouterr().out


def test_a_decoder_that_cannot_be_used_is_named(best, shards, tmp_path):
    for text, said in {
        "decoder: {kind: beam, size: none}": "decoder.size must be a whole number, not 'none'",
        "decoder: {kind: beam, lm: none.arpa}": r"none\.arpa",
        "epochs: 3": r"decoder\.yaml has no section 'decoder'",
    }.items():
        (tmp_path / "decoder.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            evaluate.main([str(best), str(shards), "--decoder", str(tmp_path / "decoder.yaml")])


def torchrun(processes: int, *arguments, program: Sequence[str] = ("-m", "ddp_asr.evaluate")):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(best, shards, tmp_path):
    """Neither by a beam search, nor by the greedy decoding beside it."""
    results, files = [], []
    lm = write_arpa(tmp_path / "lm.arpa", ["<space>", "a", "b", "'"])
    (tmp_path / "hot.txt").write_text("ab\nb'a a\n")
    settings = f"kind: beam, size: 4, symbol_bonus: 2, lm: {lm}, hot_words: {tmp_path / 'hot.txt'}"
    (tmp_path / "decoder.yaml").write_text(f"decoder: {{{settings}}}")
    for processes in (1, 2, 3):
        out = tmp_path / f"{processes}.jsonl"
        decoder = ["--decoder", tmp_path / "decoder.yaml"]
        done = torchrun(processes, best.parent, shards, "--json", "--out", out, *decoder)
        assert done.returncode == 0, done.stderr
        results.append(numbers(json.loads(done.stdout)))
        files.append(out.read_bytes())
    assert results[0] == results[1] == results[2]
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
def test_more_processes_than_batches(best, shards, tmp_path):
    few = torchrun(3, best, shards, "--json", "--max-seconds", "1000")
    assert few.returncode == 0, few.stderr
    assert json.loads(few.stdout)["utterances"] == UTTERANCES


@pytest.mark.slow
def test_a_mistake_ends_every_process_with_one_sentence(best, tmp_path):
    done = torchrun(2, best, tmp_path / "nowhere")
    assert done.returncode != 0
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= len(errors) <= 2 and all("nowhere: no such shard directory" in line for line in errors)
    assert not any("ddp_asr/evaluate.py" in line for line in done.stderr.splitlines())  # no traceback of ours


# Each rank gets a SIGTERM while it reports its mistake, as from a torchrun whose other rank has ended already.
SIGNALLED_WHILE_IT_ENDS = """
import os, signal
from ddp_asr import errors, evaluate
from ddp_asr.ranks.watchdog import Watchdog

announce_exit = Watchdog.announce_exit

def signalled(self, reason):
    os.kill(os.getpid(), signal.SIGTERM)
    announce_exit(self, reason)

Watchdog.announce_exit = signalled
raise SystemExit(errors.run_entry_point(evaluate.main))
"""


@pytest.mark.slow
def test_a_signal_does_not_interrupt_the_report_of_a_mistake(best, tmp_path):
    (tmp_path / "program.py").write_text(SIGNALLED_WHILE_IT_ENDS)
    done = torchrun(2, best, tmp_path / "nowhere", program=[str(tmp_path / "program.py")])
    assert done.returncode != 0 and "nowhere: no such shard directory" in done.stderr, done.stderr


def test_every_rank_has_as_many_rounds_and_the_corpus_is_in_them_once(best, shards):
    from ddp_asr.data.loader import eval_loader

    recogniser = load_recogniser(best)
    index = read_index([shards])
    rows, rounds = [], []
    for rank in range(4):
        batches = eval_loader(index, recogniser.tokeniser, recogniser.config, rank=rank, world_size=4)
        asked = []
        results = recognise(recogniser, index, batches, lambda asked=asked: bool(asked.append(1)))
        rows += [utterance.row for utterance in results.utterances]
        rounds.append(len(asked))
    assert len(set(rounds)) == 1
    assert sorted(rows) == list(range(UTTERANCES))


def test_a_stop_leaves_the_model_as_it_was(best, shards):
    from ddp_asr.data.loader import eval_loader

    recogniser = load_recogniser(best)
    index = read_index([shards])
    recogniser.model.train()
    batches = eval_loader(index, recogniser.tokeniser, recogniser.config)
    modes = []
    assert recognise(recogniser, index, batches, lambda: not modes.append(recogniser.model.training)) is None
    assert modes == [False]  # asked once, in the middle
    assert recogniser.model.training


def test_the_moving_average_is_evaluated_where_there_is_one(best, shards, tmp_path, capsys):
    other = tiny_state(seed=8, data={"threads": 0, "test_max_seconds": 8.0})
    averaged = {**checkpoint.read(best), "averages": other["model"]}
    facts = result(capsys, write_checkpoint(tmp_path / "averaged.pt", averaged), shards)
    expected = result(capsys, write_checkpoint(tmp_path / "other.pt", other), shards)
    assert facts["wer"] == expected["wer"] != result(capsys, best, shards)["wer"]


def test_a_run_directory_is_its_best_else_its_newest_good_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (5, 9):
        write_checkpoint(checkpoint.step_path(run, step), {**tiny_state(), "step": step})
    assert read_trained(run).step == 9
    newest = checkpoint.step_path(run, 9)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert read_trained(run).step == 5
    assert "step-00000009.pt is damaged" in capsys.readouterr().err
    write_checkpoint(run / "best.pt", {**tiny_state(), "step": 7})
    assert read_trained(run).step == 7
    (run / "best.pt").write_bytes(b"nothing")
    assert read_trained(run).step == 5


def test_checkpoints_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"there is no {tmp_path / 'none.pt'}: name a run directory")):
        read_trained(tmp_path / "none.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"damaged\.pt is damaged .*: name another one"):
        read_trained(tmp_path / "damaged.pt")
    with pytest.raises(UserError, match="holds no good checkpoint"):
        read_trained(tmp_path)
    strange = write_checkpoint(tmp_path / "strange.pt", {"weights": torch.zeros(3)})
    with pytest.raises(UserError, match=r"strange\.pt is no checkpoint of a training run"):
        read_trained(strange)
    for name, value in (("step", float("inf")), ("model", {"w": 3}), ("config", ["run"]), ("averages", 3)):
        path = write_checkpoint(tmp_path / f"{name}.pt", {**tiny_state(), name: value})
        with pytest.raises(UserError, match=rf"{name}\.pt is no checkpoint of a training run"):
            read_trained(path)
    state = tiny_state()
    state["model"]["x\0\n"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"not those of the model [ -~]*$"):
        load_recogniser(write_checkpoint(tmp_path / "control.pt", state))
    state = tiny_state()
    del state["model"]["encoder.bridge.bias"]
    with pytest.raises(UserError, match=r"not those of the model .*encoder\.bridge\.bias"):
        load_recogniser(write_checkpoint(tmp_path / "other.pt", state))


def test_utterances_that_no_longer_decode_are_named_and_not_scored(best, tmp_path, capsys):
    shards = make_shards(tmp_path)
    index = read_index([shards])
    damage(index, row=6)
    capsys.readouterr()
    facts = result(capsys, best, shards)
    assert (facts["utterances"], facts["bad_samples"]) == (UTTERANCES - 1, 1)
    assert evaluate.main([str(best), str(shards)]) == 0
    assert f"1 utterances no longer decode and are not scored: {index.key(6)} (" in capsys.readouterr().err
    for row in range(12):
        damage(index, row)
    with pytest.raises(UserError, match=r"only 11 of 23 utterances could be scored .*--verify"):
        evaluate.main([str(best), str(shards)])


def damage(index, row: int) -> None:
    with open(index.shards[index.shard[row]], "r+b") as file:
        file.seek(int(index.offset[row]))
        file.write(b"\0" * int(index.bytes[row]))


def test_arguments_that_make_no_sense(best, shards, tmp_path):
    with pytest.raises(UserError, match="--max-seconds must be above 0"):
        evaluate.main([str(best), str(shards), "--max-seconds", "0"])
    with pytest.raises(UserError, match="--threads must be 0 or more"):
        evaluate.main([str(best), str(shards), "--threads", "-1"])
    with pytest.raises(UserError, match=r"--out .* cannot be written: No such file or directory"):
        evaluate.main([str(best), str(shards), "--out", str(tmp_path / "no" / "where.jsonl")])


def test_a_summary_of_what_has_no_loss_and_of_losses_that_are_no_numbers():
    one = Recognised(0, "a", "b a", "b", math.inf)
    assert math.isnan(summarise(Results([one])).loss)
    assert summarise(Results([one, replace(one, row=1, loss=0.5)])).loss == 0.5
    assert math.isnan(summarise(Results([one, replace(one, row=1, loss=math.nan)])).loss)
