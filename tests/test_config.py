"""The declared settings: every one has bounds, a meaning and a reader; names from elsewhere lead to the right one."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
import yaml

from ddp_asr.config import Beam, Config, config_from_dict, load_config, load_decoder
from ddp_asr.errors import UserError
from ddp_asr.settings import Setting, declared, describe, describe_changes, differences, flatten, help_text, suggest
from tests.conftest import REPOSITORY


def choices():
    """No kind, and for each section with several each of them: {name of the setting: kind}."""
    yield {}
    for each in declared(Config):
        if each.name.endswith(".kind"):
            yield from ({each.name: kind} for kind in each.choices)


# The settings of every kind, and the kind for which each of them is declared.
KIND_OF: dict[str, dict[str, str]] = {}
SETTINGS: dict[str, Setting] = {}
for flat in choices():
    for each in declared(Config, flat):
        KIND_OF.setdefault(each.name, flat)
        SETTINGS.setdefault(each.name, each)
NAMES = list(SETTINGS)


def from_command_line(name, text):
    given = {**KIND_OF[name], name: text}
    return flatten(load_config(None, [f"--{key}={value}" for key, value in given.items()]))[name]


# Worked out by hand: (settings, values that pass, values that do not).
LIMITS: list[tuple[str, list[str], list[str]]] = [
    (
        "batch.max_seconds data.test_max_seconds optim.learning_rate optim.start_divisor optim.end_divisor "
        "optim.clip_norm distributed.timeout_s distributed.stop_grace_s",
        ["1e-3"],
        ["0", "-1", "inf", "nan"],
    ),
    (
        "batch.micro_batches batch.buckets encoder.conv_channels encoder.rnn_layers encoder.rnn_size encoder.blocks "
        "encoder.feed_forward_factor train.epochs train.keep_last data.prefetch",
        ["1"],
        ["0", "-1"],
    ),
    (
        "data.threads data.max_bad_samples augment.frequency_masks augment.frequency_mask_bands augment.time_masks "
        "encoder.residual_blocks optim.weight_decay train.seed train.eval_every_steps train.save_every_steps "
        "train.save_every_min train.stop_at_step train.max_nonfinite_steps train.fuse_micro_batches optim.frozen_steps "
        "tracking.samples",
        ["0", "1"],
        ["-1"],
    ),
    (
        "augment.time_mask_share augment.noise.share augment.pitch.share augment.volume.share optim.warmup_share",
        ["0", "0.5", "1"],
        ["-0.1", "1.1", "nan"],
    ),
    (
        "encoder.dropout objective.intermediate_weight optim.ema_decay optim.beta1 optim.beta2",
        ["0", "0.5"],
        ["-0.1", "1", "nan"],
    ),
    ("distributed.backend", ["auto", "nccl", "gloo"], ["mpi", ""]),
    ("augment.speeds", ["1", "0.5,2"], ["", "0", "1,-1", "inf", "nan"]),
    ("encoder.time_strides", ["1", "2,2"], ["", "0", "2,-1"]),
    ("encoder.size", ["32", "512"], ["0", "-32", "144"]),  # 8 for each of four heads
    ("encoder.heads", ["1", "8"], ["0", "-1", "3"]),
    ("encoder.kernel", ["1", "31"], ["0", "-3", "30"]),  # odd
    ("features.mel_bands", ["16", "80"], ["0", "-2", "127", "14"]),  # odd; no more than the widest mask
    (
        "features.n_fft",
        ["1024", "4096"],
        ["0", "399", "512"],
    ),  # the window has 400 samples; 512 points are too few for 128 bands
    ("features.window_ms", ["25", "20.0625"], ["0", "-5", "20.01", "65"]),  # 1/16 ms is a sample; n_fft is 64 ms
    ("features.hop_ms", ["10", "0.0625"], ["0", "-5", "10.01"]),
    ("objective.consistency_weight", ["0", "0.2", "3"], ["-0.1", "nan", "inf"]),
    ("objective.short_context_s", [""], ["0,1", "1,0.5", "-1,1", "1", "1,2,3", "nan,1", "0.4,1.2"]),  # needs two views
    ("augment.noise.snr_db_min", ["-5", "40"], ["40.1", "-inf"]),
    ("augment.noise.snr_db_max", ["15", "90"], ["14.9", "inf"]),
    ("augment.background.share", ["0"], ["-0.1", "1.1", "nan", "0.5"]),  # needs data.noise
    ("augment.room.share", ["0"], ["-0.1", "1.1", "nan", "0.5"]),  # needs data.rooms
    ("augment.pitch.semitones", ["0.25", "12"], ["0.2", "-1", "12.5", "nan"]),
    ("augment.volume.db_min", ["-5", "10"], ["10.1", "-91"]),
    ("augment.volume.db_max", ["-20", "90"], ["-20.1", "91"]),
    ("augment.background.snr_db_min", ["-5", "30"], ["30.1", "-inf"]),
    ("augment.background.snr_db_max", ["10", "90"], ["9.9", "inf"]),
    ("train.precision", ["auto", "bf16", "fp16", "tf32", "fp32"], ["FP32", "float32", ""]),
    ("optim.frozen_layers", ["0", "5"], ["-1", "6"]),  # the encoder has 5
    ("optim.anneal", ["linear", "cosine"], ["cos", ""]),
    ("optim.schedule", ["one_cycle", "inverse_sqrt"], ["noam", ""]),
    ("tracking.mode", ["auto", "online", "offline", "off"], ["on", ""]),
    ("data.train", ["a"], ["", "[]"]),
    ("vocabulary.symbols", [" ab"], ["", "aba"]),
    ("vocabulary.lowercase", ["on", "off"], []),
    ("vocabulary.size", ["28", "1024"], ["0", "-1", "27", "32769"]),  # each of the 28 characters is a piece
    ("objective.intermediate_layers", ["1", "2,4", ""], ["0", "2,2", "-1"]),
    ("encoder.kind", ["rescnn_bigru", "conformer"], ["", "none_such"]),
    ("vocabulary.kind", ["characters", "pieces"], ["", "none_such"]),
    ("decoder.kind", ["greedy", "beam", "lexicon"], ["", "none_such"]),
    ("decoder.size", ["1", "64"], ["0", "-1"]),
    ("decoder.n_best", ["1", "16"], ["0", "17"]),  # no more than decoder.size
    ("decoder.symbols_per_frame", ["0", "20"], ["-1"]),
    ("decoder.threshold", ["0.5", "50"], ["0", "-1", "inf", "nan"]),
    ("decoder.lm_weight decoder.hot_word_bonus", ["0", "1.5"], ["-0.1", "nan", "inf"]),
    ("decoder.symbol_bonus decoder.word_bonus", ["-1", "0", "2.5"], ["nan", "inf"]),
    # any text
    ("data.cache_gb", ["0", "0.5", "1e9"], ["-1", "nan", "1e10"]),
    ("run.name run.dir data.cache_dir data.test data.noise data.rooms", ["x"], []),
    ("vocabulary.drop vocabulary.model train.init_from", ["x"], []),
    ("decoder.lm decoder.lexicon decoder.hot_words", ["x"], []),
    ("tracking.to", ["comet", "tensorboard", "comet,tensorboard"], ["wandb"]),
    ("tracking.project tracking.workspace tracking.tags", ["x"], []),
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
        ("--augment.frequency_mask_bands=128",): "= 128 would hide all bands of features.mel_bands = 128",
        ("--features.mel_bands=90", "--encoder.time_strides=2,2"): "90 must be divisible by 4",
        ("--objective.short_context_s=0.4,1.2",): "objective.consistency_weight = 0 makes only one view",
        ("--objective.intermediate_weight=0.3", "--objective.intermediate_layers=1,6"): r"layers 1 to 5 .*\[1, 6\]",
        ("--objective.intermediate_weight=0.3", "--objective.intermediate_layers="): r"layers 1 to 5 .*\[\]",
        ("--augment.background.share=0.5",): "augment.background.share is above 0 and data.noise names no recordings",
        ("--augment.room.share=1",): "augment.room.share is above 0 and data.rooms names no recordings: name shard",
        ("--augment.volume.db_min=11",): "augment.volume.db_min = 11 is above augment.volume.db_max = 10: lower",
        ("--augment.background.snr_db_min=50",): "background.snr_db_min = 50 is above augment.background.snr_db_max",
        ("--augment.noise.snr_db_min=50",): "noise.snr_db_min = 50 is above augment.noise.snr_db_max = 40: lower",
        ("--vocabulary.kind=pieces", "--vocabulary.symbols=aba"): "hold each symbol once, and 'a' is repeated",
        ("--vocabulary.kind=pieces", "--vocabulary.size=20"): "size = 20 is below the 28 characters of",
        ("--vocabulary.kind=pieces", "--vocabulary.symbols=ab\u2581"): "symbols has '\u2581', which sentencepiece uses",
        ("--vocabulary.symbols=abca",): "hold each symbol once, and 'a' is repeated in 'abca'",
        (
            "--decoder.kind=beam",
            "--decoder.size=4",
            "--decoder.n_best=5",
        ): "n_best = 5 is above decoder.size = 4: lower",
        (
            "--encoder.kind=conformer",
            "--encoder.size=144",
        ): "encoder.size = 144 must be divisible by 32, 8 for each of encoder.heads = 4: choose",
        (
            "--optim.schedule=inverse_sqrt",
            "--optim.start_divisor=10",
        ): "start_divisor = 10.0 has no meaning where optim.schedule = inverse_sqrt",
        ("--optim.schedule=inverse_sqrt", "--optim.end_divisor=10"): "optim.end_divisor = 10.0 has no meaning",
        ("--optim.schedule=inverse_sqrt", "--optim.anneal=cosine"): "optim.anneal = cosine has no meaning",
        (
            "--optim.schedule=inverse_sqrt",
            "--optim.warmup_share=0",
        ): "warmup_share must be above 0 where optim.schedule",
        ("--features.n_fft=256",): "n_fft = 256 is shorter than features.window_ms = 25, 400 samples",
    }
    for overrides, said in cases.items():
        with pytest.raises(UserError, match=said):
            load_config(None, overrides)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        # names of other programs
        *((f"{section}.lr", "optim.learning_rate") for section in ("train", "optim", "optimizer", "model")),
        ("optim.wd", "optim.weight_decay"),
        ("train.batch_size", "batch.max_seconds"),
        ("trainer.max_epochs", "train.epochs"),
        ("data.workers", "data.threads"),
        ("train.num_workers", "data.threads"),
        ("train.warmup_steps", "optim.warmup_share"),
        ("train.lr_scheduler", "optim.schedule"),
        ("train.grad_clip", "optim.clip_norm"),
        ("train.accumulate_grad_batches", "batch.micro_batches"),
        ("features.n_mels", "features.mel_bands"),
        ("model.hidden_size", "encoder.rnn_size"),
        ("model.num_layers", "encoder.rnn_layers"),
        ("train.fp16", "train.precision"),
        ("data.alphabet", "vocabulary.symbols"),
        # the right key in another section
        *((f"{section}.dropout", "encoder.dropout") for section in ("train", "optim", "model")),
        ("model.rnn_size", "encoder.rnn_size"),
        ("augment.short_context_s", "objective.short_context_s"),
        ("optim.epochs", "train.epochs"),
        # the layout before sections had kinds
        ("augment.noise_share", "augment.noise.share"),
        ("model.intermediate_ctc_weight", "objective.intermediate_weight"),
        # spelling
        ("trian.epoch", "train.epochs"),
        ("optim.learning-rate", "optim.learning_rate"),
        ("model.droput", "encoder.dropout"),
    ],
)
def test_a_name_from_elsewhere_leads_to_the_setting_that_is_meant(name, meant):
    assert suggest(Config, name) == f"did you mean {meant!r}?"


@pytest.mark.parametrize("name", ["train.q", "train.on", "decoder.beam", "train.patience"])
def test_a_hint_does_not_mislead_where_nothing_is_near(name):
    assert suggest(Config, name).startswith(f"known in {name.split('.')[0]} are: ")


def test_names_of_other_programs_are_none_of_ours():
    also = {(name, each) for name, setting in SETTINGS.items() for each in setting.also_called.split()}
    assert {each for _, each in also} & {name.rpartition(".")[2] for name in NAMES} == set()
    assert {each for _, each in also if re.search("[^a-z0-9_]", each)} == set()


def test_a_checkpoint_of_an_older_layout_is_refused_in_one_sentence():
    tree = dataclasses.asdict(Config())
    older = {"run": tree["run"], "model": {"conv_channels": 32, "rnn_size": 512}, "optim": tree["optim"]}
    with pytest.raises(UserError) as error:
        config_from_dict(older, "the checkpoint best.pt")
    assert str(error.value) == (
        "unknown setting 'model.conv_channels' in the checkpoint best.pt; did you mean 'encoder.conv_channels'?"
    )


def test_a_run_is_named_after_its_file_unless_it_has_a_name(tmp_path):
    path = tmp_path / "trial.v2.yaml"
    path.write_text("")
    assert load_config(path).run.name == "trial.v2"
    assert load_config(path, ["--run.name=mine"]).run.name == "mine"
    assert load_config(None).run.name == "default"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_is_sound_and_repeats_as_it_is_saved(path, tmp_path):
    config = load_config(path)
    assert config.run.name == path.stem
    (tmp_path / "config.yaml").write_text(describe(config), encoding="utf8")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(dataclasses.asdict(config), "a checkpoint") == config
    (tmp_path / "config.yaml").write_text(describe_changes(config), encoding="utf8")
    assert load_config(tmp_path / "config.yaml") == config


def test_changes_are_what_differs_from_the_defaults_and_nothing_else():
    config = load_config(None, ["--encoder.kind=conformer", "--train.epochs=7", "--run.name=a"])
    changes = yaml.safe_load(describe_changes(config))
    assert changes == {"run": {"name": "a"}, "encoder": {"kind": "conformer"}, "train": {"epochs": 7}}
    assert describe_changes(Config()) == ""


def test_a_decoder_comes_from_its_section_of_any_settings_file(tmp_path):
    path = tmp_path / "decoder.yaml"
    path.write_text("decoder: {kind: beam, size: 8, lm_weight: 1e0}\ntrain: {epochs: 3}\n")
    assert load_decoder(path) == Beam(size=8, lm_weight=1.0)
    for text, said in {
        "train: {epochs: 3}": "decoder.yaml has no section 'decoder': write it as",
        "decoder: {size: 8}": r"unknown setting 'decoder.size' in .*decoder.yaml, where decoder.kind is 'greedy'",
        "decoder: beam": r"decoder in .*decoder.yaml is a section, not 'beam'",
        "decoder: {kind: beam, size: 0}": "decoder.size must be at least 1 and at most 10,000, not 0",
        "decoder: {kind: none_such}": "decoder.kind must be one of greedy, beam, lexicon, not 'none_such'",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            load_decoder(path)
    with pytest.raises(UserError, match=r"cannot read the settings .*none.yaml"):
        load_decoder(tmp_path / "none.yaml")


FREE = {"run", "data", "decoder", "tracking", "distributed"}  # sections that may change between attempts of one run
FREE_IN_TRAIN = {"eval_every_steps", "save_every_steps", "save_every_min", "keep_last", "stop_at_step"}
FREE_IN_TRAIN |= {"max_nonfinite_steps", "init_from", "fuse_micro_batches"}


def changed(settings, path, key):
    """`settings` with another value of the setting `key` in the section `path`."""
    if path:
        return dataclasses.replace(settings, **{path[0]: changed(getattr(settings, path[0]), path[1:], key)})
    value = getattr(settings, key)
    return dataclasses.replace(
        settings, **{key: value + type(value)("x") if isinstance(value, list | str) else value + 1}
    )


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(".kind")])
def test_what_shapes_the_result_differs_and_nothing_else_does(name):
    *path, key = name.split(".")
    ours = config_from_dict(KIND_OF[name], "the test")
    theirs = changed(ours, path, key)
    free = path[0] in FREE or (path[0] == "train" and key in FREE_IN_TRAIN)
    assert differences(ours, theirs) == ([] if free else [(name, flatten(ours)[name], flatten(theirs)[name])])


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
        *_, section, key = name.split(".")
        # Modules call their own section `settings`, the encoder `sizes`; a property of the section says `self`.
        # The engine reads `kind`.
        if key != "kind" and not {(owner, key) for owner in (section, "settings", "sizes", "self")} & found:
            unread.append(name)
    assert unread == []


def test_every_setting_has_a_meaning_and_stands_in_the_help():
    shown = " ".join(help_text(Config).split())
    for name, each in SETTINGS.items():
        assert each.meaning and f" --{name}=" in shown
        if not name.endswith(".kind"):
            assert each.meaning in shown


def test_settings_are_read_without_torch():
    program = "import ddp_asr.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
