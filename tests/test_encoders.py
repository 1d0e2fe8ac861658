"""What every registered encoder promises: lengths, padding, rows apart, context, taps, and weights that come back."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.loader import train_loader
from ddp_asr.encoders import ENCODERS, make_encoder
from ddp_asr.encoders.dropout import Dropout
from ddp_asr.features.log_mel import LogMel
from ddp_asr.ranks.world import World
from ddp_asr.runs import checkpoint
from ddp_asr.training.session import make_learner
from tests.conftest import SHARED_DATA
from tests.tiny_encoders import ABLE, CASES, MEL_BANDS, encoder_of, settings_of
from tests.tiny_speech import manifest, shard

cases = pytest.mark.parametrize(("kind", "number"), CASES, ids=lambda value: str(value))
kinds = pytest.mark.parametrize("kind", ENCODERS)


@torch.no_grad()
def relative(one, other):
    """The largest difference, as a share of the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def random_features(frames, dtype=torch.float64):
    """(B, T, F) of rows with so many frames, zero beyond them."""
    features = torch.randn(len(frames), max(frames), MEL_BANDS, dtype=dtype)
    for row, own in enumerate(frames):
        features[row, own:] = 0
    return features, torch.tensor(frames)


@given(st.sampled_from(CASES), st.lists(st.integers(1, 90), min_size=1, max_size=4))
def test_the_settings_foretell_the_frames_that_come_out(case, frames):
    encoder, lengths = encoder_of(*case), torch.tensor(frames)
    settings = settings_of(*case).encoder
    hidden, left, taps = encoder(torch.zeros(len(frames), max(frames), MEL_BANDS), lengths)
    assert hidden.shape == (len(frames), left.max(), encoder.size)
    assert left.tolist() == [settings.output_frames(T) for T in frames]
    assert left.tolist() == settings.output_frames(lengths.numpy()).tolist()
    assert {layer: tap.shape for layer, tap in taps.items()} == {
        layer: (len(frames), left.max(), size) for layer, size in encoder.tap_sizes.items()
    }


def mixed(hidden):
    """A number of hidden states (..., D); their sum, and that of their squares, is a constant behind a LayerNorm."""
    return (hidden * torch.arange(1, hidden.shape[-1] + 1).sin()).sum()


def check_padding(encoder, features, dtype, tolerance):
    """An utterance alone and beside 31 longer ones; every length leaves another remainder over hop and strides."""
    encoder, log_mel = encoder.to(dtype), LogMel(features).to(dtype)
    samples = torch.tensor([4_001] + [4_200 + 97 * n for n in range(31)])
    waveforms = torch.randint(-9_000, 9_000, (32, int(samples.max())), dtype=torch.int16)
    waveforms[torch.arange(waveforms.shape[1]) >= samples[:, None]] = 0
    together, frames, taps = encoder(*log_mel(waveforms, samples))
    for row in (0, 1, 17):
        alone, (own,), own_taps = encoder(*log_mel(waveforms[row : row + 1, : samples[row]], samples[row : row + 1]))
        assert own == frames[row] == alone.shape[1]
        assert relative(together[row, :own], alone[0]) < tolerance
        for layer, tap in own_taps.items():
            assert relative(taps[layer][row, :own], tap[0]) < tolerance


precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


@cases
@precisions
@torch.no_grad()
def test_padding_is_invisible(kind, number, dtype, tolerance):
    """Property 4, from waveform to hidden states."""
    check_padding(encoder_of(kind, number), settings_of(kind).features, dtype, tolerance)


@kinds
@precisions
@torch.no_grad()
def test_padding_is_invisible_at_the_default_sizes(kind, dtype, tolerance):
    settings = config.config_from_dict({"encoder": {"kind": kind}}, "the test")
    torch.manual_seed(0)
    encoder = make_encoder(settings.encoder, settings.features.mel_bands).eval()
    check_padding(encoder, settings.features, dtype, tolerance)


@cases
def test_what_lies_in_the_padding_changes_nothing(kind, number):
    encoder = encoder_of(kind, number).double()
    clean, frames = random_features([20, 31])
    dirty = clean.clone()
    dirty[0, 20:] = 1e6
    own = settings_of(kind, number).encoder.output_frames(20)
    assert torch.equal(encoder(clean, frames).hidden[0, :own], encoder(dirty, frames).hidden[0, :own])


@cases
def test_a_row_depends_on_all_of_itself_and_on_no_other_row(kind, number):
    encoder = encoder_of(kind, number).double()
    features, frames = random_features([30, 30, 30])
    features.requires_grad_()
    hidden = encoder(features, frames).hidden
    (gradient,) = torch.autograd.grad(mixed(hidden[1, hidden.shape[1] // 2]), features)
    depends = gradient.abs().sum(2) > 0  # (B, T): which frames a hidden state in the middle of row 1 depends on
    assert depends[1, :28].all()  # of 30: a stride may leave the very last ones out
    assert not depends[0].any() and not depends[2].any()


@kinds
def test_context_is_a_number_for_each_row(kind):
    """Rows with 0 are as without any; the others depend on nothing from afar, wherever they stand in the batch."""
    encoder, frames = encoder_of(kind).double(), [80, 70, 80, 70]
    features, lengths = random_features(frames)
    features.requires_grad_()
    unrestricted, left, _ = encoder(features, lengths)
    restricted = encoder(features, lengths, [0, 5, 0, 9]).hidden
    for row in (0, 2):
        torch.testing.assert_close(restricted[row, : left[row]], unrestricted[row, : left[row]])
    middle = 40 // settings_of(kind).encoder.time_reduction  # the hidden state around frame 40
    for row in range(4):
        (gradient,) = torch.autograd.grad(mixed(restricted[row, middle]), features, retain_graph=True)
        depends = gradient[row].abs().sum(1) > 0  # (T,): which frames that hidden state depends on
        assert depends[:70].all() if row in (0, 2) else depends[40] and not depends[:5].any() and not depends[75:].any()
        assert not depends[frames[row] :].any()
    alone = encoder(features[1:2, :70], lengths[1:2], [5]).hidden
    torch.testing.assert_close(alone[0], restricted[1, : left[1]])
    none = encoder(features, lengths, [0, 0, 0, 0]).hidden
    assert torch.equal(none, unrestricted)


@cases
def test_every_parameter_learns(kind, number):
    encoder = encoder_of(kind, number)
    features, frames = random_features([40, 33], torch.float32)
    mixed(encoder(features, frames).hidden).backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in encoder.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@kinds
def test_lower_parameters_are_those_that_a_lower_layer_depends_on(kind):
    encoder = encoder_of(kind)
    for layer in (1, 2):
        encoder.zero_grad()
        mixed(encoder(*random_features([40, 33], torch.float32)).taps[layer]).backward()
        needed = [name for name, parameter in encoder.named_parameters() if parameter.grad is not None]
        lower = {id(parameter) for parameter in encoder.lower_parameters(layer)}
        assert needed == [name for name, parameter in encoder.named_parameters() if id(parameter) in lower]
    assert len(encoder.lower_parameters(0)) == len(list(encoder.parameters()))


@kinds
def test_weights_come_back_from_a_checkpoint_bit_for_bit(kind, tmp_path):
    encoder, frames = encoder_of(kind), [40, 33]
    checkpoint.write(tmp_path / "weights.pt", checkpoint.snapshot(encoder.state_dict()), may_write=lambda: None)
    torch.manual_seed(1)
    other = make_encoder(settings_of(kind).encoder, MEL_BANDS).eval()
    features, lengths = random_features(frames, torch.float32)
    assert not torch.equal(other(features, lengths).hidden, encoder(features, lengths).hidden)
    other.load_state_dict(checkpoint.read(tmp_path / "weights.pt"))
    assert torch.equal(other(features, lengths).hidden, encoder(features, lengths).hidden)


@kinds
def test_dropout_drops_in_training_alone(kind):
    encoder = encoder_of(kind, dropout=0.5)
    features, frames = random_features([40, 33], torch.float32)
    seeds = torch.tensor([3, 4])
    whole = encoder(features, frames).hidden
    assert torch.equal(whole, encoder(features, frames, seeds=seeds).hidden)
    encoder.train()
    dropped = encoder(features, frames, seeds=seeds).hidden
    assert not torch.equal(dropped, whole)
    assert torch.equal(dropped, encoder(features, frames, seeds=seeds).hidden)
    others = encoder(features, frames, seeds=torch.tensor([3, 5])).hidden
    assert torch.equal(others[0], dropped[0]) and not torch.equal(others[1], dropped[1])
    with pytest.raises(ValueError, match="seed for each row"):
        encoder(features, frames)


@cases
def test_what_a_row_drops_depends_on_its_seed_alone(kind, number):
    """And neither on its neighbours and its place, nor on the padding."""
    encoder = encoder_of(kind, number, dropout=0.4).double().train()
    features, frames = random_features([70, 41, 33])
    hidden, left, taps = encoder(features, frames, seeds=torch.tensor([-3, 4, 5]))
    alone, _, own_taps = encoder(features[1:2, :41], frames[1:2], seeds=torch.tensor([4]))
    torch.testing.assert_close(alone[0], hidden[1, : left[1]])
    for layer, tap in own_taps.items():
        torch.testing.assert_close(tap[0], taps[layer][1, : left[1]])


@kinds
def test_every_dropout_has_a_site_of_its_own(kind):
    sites = [module.site for module in encoder_of(kind, dropout=0.4).modules() if isinstance(module, Dropout)]
    assert len(sites) > 1 and len(set(sites)) == len(sites) and None not in sites
    assert not any(isinstance(module, torch.nn.Dropout) for module in encoder_of(kind, dropout=0.4).modules())


@pytest.fixture(scope="module")
def short_speech(request, tmp_path_factory):
    """Shards of a few short utterances: AN4's where it lies beside the checkout, else synthesised."""
    directory, real = tmp_path_factory.mktemp("short-speech"), SHARED_DATA / "an4" / "train.jsonl"
    if not real.is_file():
        return shard(request.getfixturevalue("synthetic_corpus") / "test", directory / "shards")
    lines = [json.loads(line) for line in real.read_text(encoding="utf-8").splitlines()]
    few = [line for line in lines if line["id"] in ("cen2-fash-b", "cen4-fash-b", "cen7-fash-b")]
    entries = [{**line, "audio_filepath": str(real.parent / line["audio_filepath"])} for line in few]
    return shard(manifest(directory / "few.jsonl", entries), directory / "shards")


@kinds
def test_it_learns_a_few_utterances_by_heart(kind, short_speech):
    tree = {
        "data": {"train": [str(short_speech)], "threads": 0},
        "batch": {"max_seconds": 12, "micro_batches": 1},
        "features": {"mel_bands": 40, "n_fft": 512},
        "augment": {"frequency_masks": 0, "time_masks": 0},
        "encoder": {"kind": kind, "dropout": 0, **ABLE[kind]},
        "optim": {"learning_rate": 3e-3, "clip_norm": 1.0, "warmup_share": 0.1},
        "train": {"precision": "fp32"},
    }
    settings = config.config_from_dict(tree, "the test")
    corpus = read_corpus(settings)
    learner = make_learner(settings, World(0, 1, 0, torch.device("cpu")), corpus, None)
    batch = next(train_loader(corpus.index, corpus.tokeniser, corpus.plan, settings, rank=0, world_size=1))
    assert batch.utterances > 1
    for step in range(1, 301):
        loss = float(learner.accumulate(batch, step=step, last=True).mean())
        if loss < 0.1:
            return
        learner.update(step, 300, batch.utterances)
    pytest.fail(f"the loss of a symbol is still {loss}")
