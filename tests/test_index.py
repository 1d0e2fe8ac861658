"""The index: flat arrays that lead to the right bytes, several corpora, and every way of not fitting together."""

import copy
import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddp_asr.data import index
from ddp_asr.data.index import key_hashes, read_dataset_json, read_index
from ddp_asr.data.storage import open_store
from ddp_asr.errors import UserError
from ddp_asr.files import seal, sealed_json, sha256_of
from tests import tiny_speech


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora: 12 utterances in several shards, and 3 of other keys in one."""
    root = tmp_path_factory.mktemp("corpora")
    first = tiny_speech.shard(tiny_speech.librispeech(root / "a"), root / "shards-a", "--shard-mb", "0.04")
    entries = []
    for n in range(3):
        (root / f"{n}.flac").write_bytes(tiny_speech.encode(tiny_speech.noise(0.1 * (n + 1), seed=n)))
        entries.append({"audio_filepath": f"{n}.flac", "text": f" CLIP  {n} ", "id": f"clip-{n}", "speaker": "me"})
    entries[0]["language"], entries[1]["lang"] = "English", "de"
    second = tiny_speech.shard(tiny_speech.manifest(root / "m.jsonl", entries), root / "shards-b")
    return first, second


def test_columns_are_flat_arrays_of_the_promised_types(corpora):
    rows = read_index(corpora)
    assert len(rows) == 15
    types = {name: getattr(rows, name).dtype for name in ("shard", "offset", "bytes", "samples", "key_hash")}
    assert types == {"shard": "int32", "offset": "int64", "bytes": "int64", "samples": "int64", "key_hash": "uint64"}
    for name in ("keys", "texts"):
        column = getattr(rows, name)
        assert isinstance(column, pyarrow.Array) and column.type == pyarrow.string() and len(column) == 15
    assert rows.texts[12:].to_pylist() == ["CLIP  0", "CLIP  1", "CLIP  2"]
    assert rows.hours == pytest.approx((12 * 0.3 + 0.6) / 3600)


def test_every_row_of_several_corpora_leads_to_its_audio(corpora):
    rows = read_index(corpora)
    assert len(rows.shards) == len(rows.checksums) == 1 + rows.shard.max()
    assert rows.shards[-1] == f"{corpora[1]}/shard-000000.tar"
    for row in range(len(rows)):
        url = rows.shards[rows.shard[row]]
        flac = open_store(url).read(url, int(rows.offset[row]), int(rows.bytes[row]))
        waveform, rate_hz = soundfile.read(io.BytesIO(flac), dtype="int16")
        assert (len(waveform), rate_hz) == (rows.samples[row], 16_000)


def test_a_language_stands_in_the_table_and_the_shards_and_is_null_where_it_is_unknown(corpora):
    tables = [pyarrow.parquet.read_table(directory / "index.parquet") for directory in corpora]
    assert [table["language"].to_pylist() for table in tables] == [[None] * 12, ["English", "de", None]]
    with tarfile.open(corpora[1] / "shard-000000.tar") as tar:
        described = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    assert [each.get("language") for each in described] == ["English", "de", None]


def test_a_table_without_languages_of_an_older_program_is_the_same_index(corpora, tmp_path):
    shutil.copytree(corpora[0], tmp_path / "old")
    path = tmp_path / "old" / "index.parquet"
    table = pyarrow.parquet.read_table(path).drop_columns("language")
    pyarrow.parquet.write_table(table, path)
    dataset = json.loads((tmp_path / "old" / "dataset.json").read_text()) | {"index_sha256": sha256_of(path)}
    (tmp_path / "old" / "dataset.json").write_text(sealed_json(dataset))
    assert read_index([tmp_path / "old"]).fingerprint() == read_index([corpora[0]]).fingerprint()
    assert len(read_index([tmp_path / "old", corpora[1]])) == 15


def test_rows_are_taken_in_the_order_given_or_by_a_mask(corpora):
    rows = read_index(corpora)
    taken = rows.take(np.array([13, 0]))
    assert [taken.key(0), taken.key(1)] == ["clip-1", "100-7-0000"]
    assert taken.text(0) == "CLIP  1" and taken.samples.tolist() == [3200, 4800]
    assert taken.shards == rows.shards and taken.shard[0] == rows.shard[13]
    assert rows.take(rows.samples < 4000).keys.to_pylist() == ["clip-0", "clip-1"]
    assert len(rows.take([])) == 0


def test_the_hash_of_a_key_never_changes(corpora):
    """Order, masks and noise of every run depend on it."""
    assert key_hashes(["103-1240-0000", "слово"]).tolist() == [0xB7818B25E653ACF6, 0x1D4DB8DFCEC13061]
    rows = read_index(corpora)
    assert rows.key_hash.tolist() == key_hashes(rows.keys.to_pylist()).tolist()


def test_the_fingerprint_knows_the_utterances_and_nothing_else(corpora, tmp_path):
    fingerprint = read_index(corpora).fingerprint()
    assert read_index(reversed(list(corpora))).fingerprint() == fingerprint
    recut = tiny_speech.shard(tiny_speech.librispeech(tmp_path / "elsewhere"), tmp_path / "recut")
    assert read_index([recut]).fingerprint() == read_index(corpora[:1]).fingerprint() != fingerprint
    rows = read_index(corpora)
    assert rows.take(np.arange(14)).fingerprint() != fingerprint
    other = tiny_speech.librispeech(tmp_path / "other")
    transcripts = other / "100" / "7" / "100-7.trans.txt"
    transcripts.write_text(transcripts.read_text().replace("MORE", "LESS", 1))
    changed = tiny_speech.shard(other, tmp_path / "changed")
    assert read_index([changed]).fingerprint() != read_index([recut]).fingerprint()


def test_a_key_may_be_there_once_only(corpora):
    with pytest.raises(UserError, match=r"12 utterances .* more than once, such as '100-7-0000' in .*shards-a and"):
        read_index([*corpora, corpora[0]])


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("train-clean-100", "ddp_asr.shard train-clean-100 --out "),
        ("dev-other", "ddp_asr.shard dev-other --out "),
        ("mine", "ddp_asr.shard SOURCE --out "),
    ],
)
def test_a_missing_directory_names_the_command_that_makes_it(tmp_path, name, command):
    with pytest.raises(UserError, match=f"no such shard directory.*{command}.*{name}"):
        read_index([tmp_path / name])
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"not finished.*{command}.*{name}"):
        read_index([tmp_path / name])


def test_no_directory_at_all_is_told():
    with pytest.raises(UserError, match="name at least one"):
        read_index([])


@pytest.fixture
def broken(corpora, tmp_path):
    """A copy of the second corpus to break, and its `dataset.json`."""
    for name, data in tiny_speech.content(corpora[1]).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path, json.loads((tmp_path / "dataset.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"describes \('ddp_asr shards', 2\), this program reads \('ddp_asr shards', 1\)"),
        ({"format": "something else"}, r"describes \('something else', 1\), this program reads"),
    ],
)
def test_a_description_that_does_not_fit_is_told(broken, change, message):
    directory, dataset = broken
    (directory / "dataset.json").write_text(sealed_json(dataset | change))
    with pytest.raises(UserError, match=message):
        read_index([directory])


def test_a_shard_of_more_bytes_than_a_number_holds_is_told(broken):
    directory, dataset = broken
    for shard in dataset["shards"]:
        shard["bytes"] = 10**30
    (directory / "dataset.json").write_text(sealed_json(dataset))
    with pytest.raises(UserError, match=r"is no table of these shards"):
        read_index([directory])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_description_is_told(broken, content):
    (broken[0] / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset.json"):
        read_dataset_json(broken[0])


def test_no_flipped_bit_of_the_table_goes_unnoticed(broken):
    """One bit of every byte; without the checksum many of them change a value and raise nothing."""
    path = broken[0] / "index.parquet"
    good = path.read_bytes()
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"index.parquet does not match its checksum .* delete .* shard it again"):
            read_index([broken[0]])
    path.write_bytes(good)
    assert len(read_index([broken[0]])) == 3


def test_no_flipped_bit_of_the_description_changes_what_is_read(broken):
    """One bit of every byte. Without the seal a flip in a shard's checksum, for one, would raise nothing."""
    path = broken[0] / "dataset.json"
    good = path.read_bytes()
    whole, refused = contents(read_index([broken[0]])), 0
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert contents(read_index([broken[0]])) == whole  # the flip is in a space, or in the name of the seal
        except UserError:
            refused += 1
    assert refused > 0.8 * len(good)


def contents(index):
    """All that a training takes from an index."""
    columns = (index.shard, index.offset, index.bytes, index.samples, index.keys, index.texts, index.key_hash)
    return index.shards, index.checksums, [column.tolist() for column in columns]


WRONG = [None, True, -1, 0, 2**70, 1.5, "x", "../../secret", "/etc/passwd", [], [1], {}, {"a": 1}, "\ud800"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), sealed=st.booleans())
def test_a_description_that_was_edited_is_refused_or_means_the_same(broken, data, sealed):
    """Any field, at any depth, is replaced or deleted; with a seal that is right, and without one."""
    directory, dataset = broken[0], copy.deepcopy(broken[1])
    dataset.pop("seal", None)
    place = dataset
    while True:
        name = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        if not (isinstance(place[name], dict | list) and place[name] and data.draw(st.booleans())):
            break
        place = place[name]
    if data.draw(st.booleans()):
        place[name] = data.draw(st.sampled_from(WRONG))
    else:
        del place[name]
    (directory / "dataset.json").write_text(json.dumps(dataset | ({"seal": seal(dataset)} if sealed else {})))
    try:
        index = read_index([directory])
        assert index.shards == (f"{directory}/shard-000000.tar",) and len(index) == 3
    except UserError as refused:
        assert str(refused).count("\n") == 0


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "shard-000000.tar/../../secret.tar", "..", ""])
def test_no_shard_is_read_or_copied_outside_its_directory(broken, name):
    directory, dataset = broken
    shard = dataset["shards"][0]
    for wrong in ({"name": name}, {"sha256": f"../../{name}"}):
        changed = dataset | {"shards": [shard | wrong]}
        (directory / "dataset.json").write_text(sealed_json(changed))
        with pytest.raises(UserError, match=r"dataset.json says .* for a shard; delete"):
            read_index([directory])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", 1),
        ("shard", -1),
        ("offset", -1),
        ("offset", 2**62),
        ("bytes", 0),
        ("bytes", 2**62),
        ("samples", 0),
        ("samples", 2**40),
    ]
    + [(name, None) for name in index.COLUMNS.names if name != "language"],
)
def test_a_table_that_leads_out_of_its_shards_is_refused(broken, column, value):
    directory, dataset = broken
    table = pyarrow.parquet.read_table(directory / "index.parquet").to_pydict()
    table[column][1] = value
    index.write_index(directory / "index.parquet", table)
    sealed = dataset | {"index_sha256": sha256_of(directory / "index.parquet")}
    (directory / "dataset.json").write_text(sealed_json(sealed))
    with pytest.raises(UserError, match=r"index.parquet is no table of these shards, though its checksum is right"):
        read_index([directory])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table", b"another schema"])
def test_what_is_no_table_is_refused_behind_a_right_checksum(broken, content):
    directory, dataset = broken
    path = directory / "index.parquet"
    path.write_bytes(content)
    if content == b"another schema":
        pyarrow.parquet.write_table(pyarrow.table({"key": [1]}), path)
    (directory / "dataset.json").write_text(sealed_json(dataset | {"index_sha256": sha256_of(path)}))
    with pytest.raises(UserError, match=r"index.parquet is no table of these shards"):
        read_index([directory])


def test_shards_made_before_the_seal_can_be_read(broken):
    directory, dataset = broken
    del dataset["seal"]
    (directory / "dataset.json").write_text(json.dumps(dataset))
    assert len(read_index([directory])) == 3


def test_a_description_without_the_checksum_is_told(broken):
    directory, dataset = broken
    del dataset["index_sha256"]
    (directory / "dataset.json").write_text(sealed_json(dataset))
    with pytest.raises(UserError, match=r"index.parquet does not match its checksum"):
        read_index([directory])


def test_a_missing_shard_is_told(broken):
    (broken[0] / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000000.tar is missing; delete .* and shard it again"):
        read_index([broken[0]])


def test_a_missing_table_is_told(broken):
    (broken[0] / "index.parquet").unlink()
    with pytest.raises(UserError, match=r"index.parquet cannot be read .* delete .* shard it again"):
        read_index([broken[0]])


def test_a_shard_of_another_size_is_told(broken):
    path = broken[0] / "shard-000000.tar"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"shard-000000.tar has \d+ bytes instead of"):
        read_index([broken[0]])


def test_the_table_is_written_the_same_every_time(tmp_path):
    strings = ("key", "text", "speaker", "language")
    columns = {name: ["a"] if name in strings else [1] for name in index.COLUMNS.names}
    index.write_index(tmp_path / "one", columns)
    index.write_index(tmp_path / "two", columns)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
