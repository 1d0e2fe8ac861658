"""Settings: every text becomes what its field declares, from file and command line alike; what is wrong is named."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.config import Config, config_from_dict, describe, differences, flatten, load_config, to_dict
from ddp_asr.errors import UserError
from tests.conftest import REPOSITORY

NAMES = [name for name, _ in flatten(Config())]


def from_command_line(name, text):
    return dict(flatten(load_config(None, [f"--{name}={text}"])))[name]


def from_file(tmp_path, name, text):
    section, key = name.split(".")
    path = tmp_path / "settings.yaml"
    path.write_text(f"{section}:\n  {key}: {text}\n", encoding="utf8")
    return dict(flatten(load_config(path)))[name]


@pytest.mark.parametrize(
    "name, text, expected",
    [
        # what YAML 1.1 would make something else of
        ("tracking.mode", "off", "off"),
        ("run.name", "no", "no"),
        ("run.name", "on", "on"),
        ("run.name", "Yes", "Yes"),
        ("run.name", "null", "null"),
        ("run.name", "2024-01-31", "2024-01-31"),
        ("run.name", "1e3", "1e3"),
        ("vocabulary.symbols", "01234567", "01234567"),
        ("optim.learning_rate", "5e-4", 5e-4),
        ("optim.learning_rate", "5E-04", 5e-4),
        ("train.epochs", "010", 10),
        # types
        ("batch.max_seconds", "90", 90.0),
        ("train.epochs", "1e3", 1000),
        ("train.epochs", "3.0", 3),
        ("train.seed", "9007199254740993", 2**53 + 1),  # no float holds it
        ("vocabulary.lowercase", "off", False),
        ("vocabulary.lowercase", "no", False),
        ("vocabulary.lowercase", "False", False),
        ("vocabulary.lowercase", "on", True),
        ("vocabulary.lowercase", "yes", True),
        ("vocabulary.lowercase", "TRUE", True),
        ("tracking.workspace", "", ""),
        # lists
        ("data.train", "a", ["a"]),
        ("data.train", "a, b,c", ["a", "b", "c"]),
        ("data.train", "[a, 'b, c']", ["a", "b, c"]),
        ("data.train", "[off, 010]", ["off", "010"]),
        ("data.test", "", []),
        ("data.test", "[]", []),
        ("model.time_strides", "2,1", [2, 1]),
        ("model.time_strides", "[2, 1]", [2, 1]),
        ("model.time_strides", "1", [1]),
        ("augment.speeds", "0.9,1,1.1", [0.9, 1.0, 1.1]),
    ],
)
def test_a_text_becomes_what_its_field_declares_from_file_and_command_line_alike(tmp_path, name, text, expected):
    for value in (from_command_line(name, text), from_file(tmp_path, name, text)):
        assert value == expected and type(value) is type(expected)


@given(st.sampled_from([n for n in NAMES if n.split(".")[0] in ("run", "tracking")]), st.data())
def test_any_word_reads_alike_from_file_and_command_line(tmp_path_factory, name, data):
    text = data.draw(st.from_regex(r"[A-Za-z0-9~+.][A-Za-z0-9_.:+-]{0,8}[A-Za-z0-9]", fullmatch=True))
    results = []
    for read in (from_command_line, lambda *given: from_file(tmp_path_factory.getbasetemp(), *given)):
        try:
            results.append(read(name, text))
        except UserError as error:
            results.append(str(error))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("train.epochs", "2.5", "train.epochs must be a whole number, not '2.5'"),
        ("train.epochs", "many", "train.epochs must be a whole number, not 'many'"),
        ("train.epochs", "", "train.epochs must be a whole number, not ''"),
        ("train.epochs", "inf", "train.epochs must be a whole number, not 'inf'"),
        ("train.epochs", "[3]", "train.epochs must be a whole number, not ['3']"),
        ("optim.learning_rate", "fast", "optim.learning_rate must be a number, not 'fast'"),
        ("optim.learning_rate", "on", "optim.learning_rate must be a number, not 'on'"),
        ("vocabulary.lowercase", "maybe", "vocabulary.lowercase must be true or false, not 'maybe'"),
        ("vocabulary.lowercase", "1", "vocabulary.lowercase must be true or false, not '1'"),
        ("model.time_strides", "2,x", "model.time_strides must be a whole number, not 'x'"),
        ("run.name", "[a]", "run.name must be a text, not ['a']"),
    ],
)
def test_a_text_of_another_type_is_refused_alike(tmp_path, name, text, said):
    for read in (from_command_line, lambda *given: from_file(tmp_path, *given)):
        with pytest.raises(UserError) as error:
            read(name, text)
        assert str(error.value) == said


# Worked out by hand: (settings, values that pass, values that do not).
LIMITS: list[tuple[str, list[str], list[str]]] = [
    (
        "batch.max_seconds optim.learning_rate optim.start_divisor optim.end_divisor optim.clip_norm "
        "distributed.timeout_s distributed.stop_grace_s",
        ["1e-3"],
        ["0", "-1", "inf", "nan"],
    ),
    (
        "batch.micro_batches batch.buckets model.conv_channels model.rnn_layers model.rnn_size train.epochs "
        "train.keep_last data.prefetch",
        ["1"],
        ["0", "-1"],
    ),
    (
        "data.workers data.max_bad_samples augment.frequency_masks augment.frequency_mask_bands augment.time_masks "
        "model.residual_blocks optim.weight_decay train.seed train.eval_every_steps train.save_every_steps "
        "train.save_every_min train.stop_at_step train.max_nonfinite_steps tracking.samples",
        ["0", "1"],
        ["-1"],
    ),
    ("augment.time_mask_share augment.noise_share optim.warmup_share", ["0", "0.5", "1"], ["-0.1", "1.1", "nan"]),
    (
        "model.dropout model.intermediate_ctc_weight optim.ema_decay optim.beta1 optim.beta2",
        ["0", "0.5"],
        ["-0.1", "1", "nan"],
    ),
    ("augment.speeds", ["1", "0.5,2"], ["", "0", "1,-1", "inf", "nan"]),
    ("model.time_strides", ["1", "2,2"], ["", "0", "2,-1"]),
    ("features.mel_bands", ["16", "80"], ["0", "-2", "127", "14"]),  # odd; no more than the widest mask
    ("features.n_fft", ["400", "512"], ["0", "399"]),  # the window has 400 samples
    ("features.window_ms", ["25", "20.0625"], ["0", "-5", "20.01", "65"]),  # 1/16 ms is a sample; n_fft is 64 ms
    ("features.hop_ms", ["10", "0.0625"], ["0", "-5", "10.01"]),
    ("augment.consistency_weight", ["0", "0.2", "3"], ["-0.1", "nan", "inf"]),
    ("augment.short_context_s", [""], ["0,1", "1,0.5", "-1,1", "1", "1,2,3", "nan,1", "0.4,1.2"]),  # needs two views
    ("augment.noise_snr_db_min", ["-5", "40"], ["40.1", "-inf"]),
    ("augment.noise_snr_db_max", ["15", "90"], ["14.9", "inf"]),
    ("train.precision", ["auto", "bf16", "fp16", "tf32", "fp32"], ["FP32", "float32", ""]),
    ("optim.anneal", ["linear", "cosine"], ["cos", ""]),
    ("tracking.mode", ["auto", "online", "offline", "off"], ["on", ""]),
    ("data.train", ["a"], ["", "[]"]),
    ("vocabulary.symbols", [" ab"], ["", "aba"]),
    ("vocabulary.lowercase", ["on", "off"], []),
    # any text
    ("run.name run.dir data.cache_dir data.test vocabulary.drop train.init_from", ["x"], []),
    ("tracking.project tracking.workspace", ["x"], []),
]
BOUNDS = [(name, good, bad) for names, good, bad in LIMITS for name in names.split()]


def test_the_bounds_are_of_every_setting():
    assert sorted(name for name, _, _ in BOUNDS) == sorted(NAMES)


@pytest.mark.parametrize("name, good, bad", BOUNDS, ids=[name for name, _, _ in BOUNDS])
def test_every_setting_has_its_bounds_and_names_itself(name, good, bad):
    for text in good:
        from_command_line(name, text)
    for text in bad:
        with pytest.raises(UserError, match=re.escape(name)):
            from_command_line(name, text)


def test_settings_at_odds_with_each_other_name_both():
    cases = {
        (
            "--features.mel_bands=20",
            "--augment.frequency_mask_bands=20",
        ): "= 20 would hide all bands of features.mel_bands = 20",
        ("--features.mel_bands=90", "--model.time_strides=2,2"): "90 must be divisible by 4",
        ("--augment.short_context_s=0.4,1.2",): "augment.consistency_weight = 0 makes no second view",
        ("--features.n_fft=256",): "n_fft = 256 is shorter than features.window_ms = 25, 400 samples",
    }
    for overrides, said in cases.items():
        with pytest.raises(UserError, match=said):
            load_config(None, overrides)


@pytest.mark.parametrize(
    "override, said",
    [
        ("--train.epoch=3", "unknown setting 'train.epoch' in the command line; did you mean 'train.epochs'?"),
        ("--optim.lr=1", "unknown setting 'optim.lr' in the command line"),
        ("--trian.epochs=3", "unknown section 'trian' in the command line; did you mean 'train'?"),
        ("--zzz.epochs=3", "unknown section 'zzz' in the command line; known are: run, data, vocabulary"),
        ("train.epochs=3", "'train.epochs=3' is no setting: write --section.key=value"),
        ("--epochs=3", "'--epochs=3' is no setting: write --section.key=value"),
        ("--train.epochs", "'--train.epochs' is no setting: write --section.key=value"),
    ],
)
def test_an_unknown_override_names_the_nearest(tmp_path, override, said):
    path = tmp_path / "given.yaml"
    path.write_text("train:\n  epochs: 3\n")
    for file in (None, path):
        with pytest.raises(UserError, match=re.escape(said)):
            load_config(file, [override])


@pytest.mark.parametrize(
    "text, said",
    [
        ("train:\n  epoch: 3\n", r"unknown setting 'train.epoch' in .*given.yaml; did you mean 'train.epochs'\?"),
        ("optimiser:\n  beta1: 0\n", r"unknown section 'optimiser' in .*given.yaml; did you mean 'optim'\?"),
        ("1:\n  beta1: 0\n", "unknown section '1' in"),
        ("train:\n  on: 3\n", "unknown setting 'train.on' in"),
        ("train:\n  epochs: 3\n  epochs: 4\n", "given.yaml is no valid YAML: 'epochs' is given twice .*line 3"),
        ("train: {epochs: 3}\ntrain: {seed: 3}\n", "'train' is given twice"),
        ("[a]: 3\n", "given.yaml is no valid YAML"),
        ("train:\n\tepochs: 3\n", "given.yaml is no valid YAML: .*line 2"),
        ("train: 3\n", "given.yaml must hold sections of settings"),
        ("- train\n", "given.yaml must hold settings by their names"),
        ("train", "given.yaml must hold settings by their names"),
        (b"\xff\xfe\x00", "given.yaml is no valid YAML"),
        (None, "cannot read the settings .*given.yaml: No such file"),
    ],
)
def test_a_file_that_cannot_be_understood_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "given.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_the_command_line_lies_on_top_of_the_file_and_the_last_word_counts(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text("train:\n  epochs: 3\n  seed: 5\ndata:\n")
    given = load_config(path, ["--train.epochs=4", "--train.epochs=6"])
    assert (given.train.epochs, given.train.seed, given.train.keep_last) == (6, 5, config.Train().keep_last)


def test_a_run_is_named_after_its_file_unless_it_has_a_name(tmp_path):
    path = tmp_path / "trial.v2.yaml"
    path.write_text("")
    assert load_config(path).run.name == "trial.v2"
    assert load_config(path, ["--run.name=mine"]).run.name == "mine"
    assert load_config(None).run.name == "default"


TEXTS = st.text(st.characters(codec="utf8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=12)


@pytest.mark.parametrize("setting", ["run.dir", "vocabulary.drop", "data.test"])
def test_a_control_character_is_refused(setting):
    with pytest.raises(UserError, match=rf"{setting} holds the control character '\\x85'"):
        load_config(None, [f"--{setting}=a\x85b"])


@given(
    st.builds(
        config_from_dict,
        st.fixed_dictionaries(
            {
                "run": st.fixed_dictionaries({"name": TEXTS.filter(bool), "dir": TEXTS}),
                "data": st.fixed_dictionaries({"test": st.lists(TEXTS, max_size=3)}),
                "vocabulary": st.fixed_dictionaries({"drop": TEXTS, "lowercase": st.booleans()}),
                "batch": st.fixed_dictionaries({"max_seconds": st.floats(1e-300, 1e300)}),
                "augment": st.fixed_dictionaries({"speeds": st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3)}),
                "train": st.fixed_dictionaries({"seed": st.integers(0, 2**63)}),
            }
        ),
        st.just("the test"),
    )
)
def test_the_saved_file_repeats_the_run(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(describe(settings), encoding="utf8")
    assert load_config(path) == settings
    assert config_from_dict(to_dict(settings), "a checkpoint") == settings


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_is_sound(path):
    assert load_config(path).run.name == path.stem


FREE = {"run", "data", "tracking", "distributed"}  # sections that may change between attempts of one run
FREE_IN_TRAIN = {"eval_every_steps", "save_every_steps", "save_every_min", "keep_last", "stop_at_step"}
FREE_IN_TRAIN |= {"max_nonfinite_steps", "init_from"}


@pytest.mark.parametrize("name", NAMES)
def test_what_shapes_the_result_differs_and_nothing_else_does(name):
    section, key = name.split(".")
    ours = Config()
    value = getattr(getattr(ours, section), key)
    other = value + type(value)("x") if isinstance(value, list | str) else value + 1
    theirs = dataclasses.replace(ours, **{section: dataclasses.replace(getattr(ours, section), **{key: other})})
    free = section in FREE or (section == "train" and key in FREE_IN_TRAIN)
    assert differences(ours, theirs) == ([] if free else [(name, value, other)])


def test_the_first_difference_comes_first():
    theirs = load_config(None, ["--model.rnn_size=7", "--batch.buckets=2", "--train.seed=9"])
    assert [name for name, _, _ in differences(Config(), theirs)] == ["batch.buckets", "model.rnn_size", "train.seed"]


def reads():
    """(owner, name) of each attribute that the package reads; of config.py only what its dataclasses compute."""
    for path in sorted((REPOSITORY / "ddp_asr").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf8"))
        if path.stem == "config":
            tree = ast.Module([node for node in tree.body if isinstance(node, ast.ClassDef)], [])
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=owner, attr=name, ctx=ast.Load()):
                    yield ast.unparse(owner).split(".")[-1], name
                # tracking reads a run's saved settings, which may be of another version
                case ast.Call(func=ast.Attribute(value=owner, attr="get"), args=[ast.Constant(value=name), *_]):
                    yield ast.unparse(owner).split(".")[-1], name


def test_no_setting_that_nothing_reads():
    found = set(reads())
    unread = []
    for name in NAMES:
        section, key = name.split(".")
        # Modules call their own section `settings`, the model `sizes`; a property of the section says `self`.
        if not {(owner, key) for owner in (section, "settings", "sizes", "self")} & found:
            unread.append(name)
    assert unread == []


def test_every_setting_has_a_meaning_and_stands_in_the_help():
    shown = config.settings_help()
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        for field in dataclasses.fields(kind):
            assert field.metadata["meaning"] in shown
            assert f"--{section.name}.{field.name}=" in shown


def test_nothing_can_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.epochs = 3
    assert Config().data.train is not Config().data.train


def test_settings_are_read_without_torch():
    program = "import ddp_asr.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
