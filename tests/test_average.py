"""The mean of checkpoints: of which, of what, and that it is a checkpoint like any other."""

import json

import numpy as np
import pytest
import torch

from ddp_asr import evaluate
from ddp_asr.average import main
from ddp_asr.errors import UserError, counted
from ddp_asr.recognition.recogniser import build_recogniser, read_trained
from ddp_asr.runs import checkpoint
from tests import tiny_training as tiny
from tests.tiny_recogniser import tiny_state, write_checkpoint


def averaged(*arguments):
    assert main([*map(str, arguments)]) == 0
    return checkpoint.read(arguments[arguments.index("--out") + 1])


def with_average(seed, **more):
    """A state whose moving average is of other weights."""
    state = tiny_state(seed)
    names = [name for name, _ in build_model(state).named_parameters()]
    return {**state, "averages": {name: tiny_state(100 + seed)["model"][name] for name in names}, **more}


def build_model(state):
    from ddp_asr.config import config_from_dict
    from ddp_asr.model import make_model

    return make_model(config_from_dict(state["config"], "the test"), 5)


def mean(states):
    """In float64, by numpy."""
    return {
        name: np.mean([state[name].numpy().astype(np.float64) for state in states], axis=0).astype(np.float32)
        for name in states[0]
    }


@pytest.fixture
def run(tmp_path):
    """Five checkpoints of steps 10 to 50, evaluated at 10 to 40 and at 5, and the best one, of step 5."""
    states = {step: with_average(step, step=step, epoch=1 + step // 20) for step in (5, 10, 20, 30, 40, 50)}
    for step, state in states.items():
        path = tmp_path / "run" / "best.pt" if step == 5 else checkpoint.step_path(tmp_path / "run", step)
        write_checkpoint(path, state)
    rates = {5: (0.1, 1.0), 10: (0.5, 3.0), 20: (0.4, 3.0), 30: (0.4, 2.0), 40: (0.6, 1.0), 45: (0.0, 1.0)}
    lines = [{"kind": "test", "step": step, "wer": wer, "loss": loss} for step, (wer, loss) in rates.items()]
    lines += [{"kind": "test", "step": 50, "wer": None, "loss": None}, {"kind": "train", "step": 50, "loss": 1.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run", states


@pytest.mark.parametrize("which", ["ema", "plain", None])
@pytest.mark.parametrize(
    "choice, steps", [("--last 3", [30, 40, 50]), ("--best 3", [5, 20, 30]), ("--best 2", [5, 30])]
)
def test_the_mean_is_that_of_the_checkpoints_that_were_asked_for(run, tmp_path, capsys, choice, steps, which):
    directory, states = run
    options = ["--weights", which] if which else []
    state = averaged(directory, *choice.split(), *options, "--out", tmp_path / "mean.pt")
    chosen = [states[step]["model"] | (states[step]["averages"] if which != "plain" else {}) for step in steps]
    expected = mean(chosen)
    assert state["model"].keys() == expected.keys()
    for name, weight in state["model"].items():
        assert weight.dtype == torch.float32 and np.abs(weight.numpy() - expected[name]).max() <= 1e-7
    assert (state["step"], state["averages"]) == (steps[-1], None)
    assert state["averaged"]["steps"] == steps and state["averaged"]["weights"] == (which or "ema")
    assert (
        f"mean of {counted(len(steps), 'checkpoint')}, {which or 'ema'} weights of steps {', '.join(map(str, steps))}"
        in (capsys.readouterr().out)
    )


def test_the_mean_of_one_is_itself_bit_for_bit(tmp_path):
    path = write_checkpoint(tmp_path / "a.pt")
    for paths in ([path], [path, path, path, path]):
        state = averaged(*paths, "--out", tmp_path / "mean.pt")
        assert tiny.differences(state["model"], tiny_state()["model"]) == []


def test_what_cannot_be_averaged_is_refused_in_one_sentence(run, tmp_path):
    directory, _ = run
    small, out = write_checkpoint(tmp_path / "small.pt"), ["--out", str(tmp_path / "mean.pt")]
    cases = {
        (directory, "--last", "6"): r"holds 5 checkpoints and --last asks for 6: lower it, or train with a larger",
        (directory, "--best", "6"): r"holds 6 checkpoints, of which 5 were evaluated, and --best asks for 6",
        (directory, "--last", "0"): "--last must be 1 or more, not 0",
        (directory,): "which checkpoints of the run",
        (small, "--last", "2"): "--last and --best take one run directory",
        (tmp_path / "none", "--best", "2"): "--last and --best take one run directory",
        (tmp_path / "none.pt", small): "there is no .*none.pt",
        (small, "--weights", "ema"): "small.pt has no moving average of its weights",
        (checkpoint.step_path(directory, 50), small): "small.pt has no moving average",
    }
    for arguments, said in cases.items():
        with pytest.raises(UserError, match=said):
            main([*map(str, arguments), *out])
    others = {
        "settings of encoder": {"encoder": {"conv_channels": 2, "residual_blocks": 1, "rnn_layers": 1, "rnn_size": 8}},
        "settings of features": {"features": {"mel_bands": 16, "n_fft": 512, "hop_ms": 10.0}},
        "symbols": {"vocabulary": {"symbols": " abc"}},
    }
    for other, sections in others.items():
        path = write_checkpoint(tmp_path / "other.pt", tiny_state(**sections))
        with pytest.raises(UserError, match=f"other.pt has other {other} than .*small.pt: average checkpoints of one"):
            main([str(small), str(path), *out])
    (tmp_path / "other.pt").write_bytes(small.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"other.pt is damaged"):
        main([str(small), str(tmp_path / "other.pt"), *out])
    checkpoint.write(tmp_path / "other.pt", {"model": {}, "averages": None}, may_write=lambda: None)
    with pytest.raises(UserError, match=r"other.pt is no checkpoint of a training run"):
        main([str(small), str(tmp_path / "other.pt"), *out])
    assert not (tmp_path / "mean.pt").exists()


@pytest.mark.parametrize("place", ["run/best.pt", "run/checkpoints/mean.pt", "link/mean.pt", "none/mean.pt", "run"])
def test_the_mean_is_never_written_where_a_run_looks_for_its_own(run, tmp_path, place):
    directory, _ = run
    (tmp_path / "link").symlink_to(directory / "checkpoints")
    before = sorted(path.name for path in directory.rglob("*"))
    with pytest.raises(UserError, match=r"--out .*(choose another|cannot be written|is a directory)"):
        main([str(directory), "--last", "2", "--out", str(tmp_path / place)])
    assert sorted(path.name for path in directory.rglob("*")) == before


def test_a_training_that_is_writing_beside_it_is_not_disturbed(run):
    directory, _ = run
    aside = directory / ".best.pt.0123456789abcdef-01234567.tmp"  # of another process
    aside.write_bytes(b"half")
    averaged(directory, "--last", "2", "--out", directory / "mean.pt")
    assert aside.read_bytes() == b"half"
    assert checkpoint.newest_good(directory, lambda *_: None).step == 50


@pytest.mark.slow
def test_the_mean_is_a_checkpoint_like_any_other(tiny_corpus, tmp_path, capsys):
    """Of a real run: evaluated, a start of another run, and no place to resume from."""
    saved = ("--train.save_every_steps=4", "--train.eval_every_steps=4")
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *saved))
    out = tmp_path / "run" / "mean.pt"
    state = averaged(tmp_path / "run", "--best", "2", "--out", out)
    assert state["averaged"]["weights"] == "ema"
    trained = read_trained(out)
    assert trained.step == state["step"] and build_recogniser(trained, torch.device("cpu")).tokeniser.size == 5
    capsys.readouterr()
    assert evaluate.main([str(out), str(tiny_corpus.test), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["utterances"]) == (state["step"], 7)
    begun = tiny.train(
        tiny_corpus.arguments(tmp_path, "tuned", f"--train.init_from={out}", "--train.stop_at_step=1", *saved)
    )
    assert "run " in begun
    said = tiny.start([*tiny_corpus.arguments(tmp_path, "other", *saved), "--resume", str(out)]).fail()
    assert "is no checkpoint of ddp_asr.train" in said
