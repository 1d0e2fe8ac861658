"""Datasets of Hugging Face on disk as a source, written by `datasets`, and what of them is refused."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ddp_asr.data.audio import pack
from ddp_asr.data.index import read_index
from ddp_asr.data.sources import MISSING_AUDIO, MISSING_TRANSCRIPT, SourceOptions, open_source
from ddp_asr.errors import UserError
from tests import tiny_speech


def listed(source):
    total, utterances = open_source(str(source), SourceOptions()).open()
    found = list(utterances)
    assert len(found) == total
    return found


def flac(n):
    return tiny_speech.encode(tiny_speech.noise(0.1, seed=n))


@pytest.fixture
def rows():
    return [
        {"audio": {"bytes": flac(n), "path": f"take {n}.flac"}, "sentence": f"TEXT {n}", "lang": "de"} for n in range(5)
    ]


@pytest.fixture
def expected():
    return [(f"take_{n}", f"TEXT {n}", "de", flac(n)) for n in range(5)]


def told(utterances):
    return [(u.key, u.text, u.language, pack(u).flac) for u in utterances]


def test_arrow_and_parquet_in_one_file_or_several_are_the_same_utterances(tmp_path, rows, expected):
    dataset = tiny_speech.huggingface(rows)
    dataset.save_to_disk(tmp_path / "one")
    dataset.save_to_disk(tmp_path / "three", num_shards=3)
    dataset.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for n in range(2):
        path = tmp_path / "hub" / "data" / f"train-{n:05d}-of-00002-0123456789abcdef.parquet"
        dataset.shard(2, n, contiguous=True).to_parquet(path)
    for source in ("one", "three", "x.parquet", "hub", "hub/data", "hub/data/train"):
        assert told(listed(tmp_path / source)) == expected
    arrow = tmp_path / "one" / "data-00000-of-00001.arrow"
    assert told(listed(arrow)) == expected
    first = tmp_path / "hub" / "data" / "train-00000-of-00002-0123456789abcdef.parquet"
    assert told(listed(first)) == expected[:3]  # a file by its name, though others belong to it


def test_a_split_is_named_where_there_are_several(tmp_path, rows, expected):
    dataset = tiny_speech.huggingface(rows)
    parts = {"train": dataset.select(range(3)), "test": dataset.select(range(3, 5))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for split, part in parts.items():
        (tmp_path / "hub").mkdir(exist_ok=True)
        part.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    for root in (tmp_path / "saved", tmp_path / "hub"):
        with pytest.raises(UserError, match=rf"{root.name} holds the splits test, train; name one of them, such as"):
            listed(root)
        assert told(listed(root / "train")) == expected[:3]
        assert told(listed(root / "test")) == expected[3:]
        with pytest.raises(UserError, match=r"is neither a file nor a directory"):
            listed(root / "validation")
    datasets.DatasetDict({"only": dataset}).save_to_disk(tmp_path / "one")
    assert told(listed(tmp_path / "one")) == expected


def test_what_a_row_lacks(tmp_path):
    (tmp_path / "beside.flac").write_bytes(flac(7))
    table = {
        "audio": [
            {"bytes": flac(0), "path": None},
            {"bytes": None, "path": "beside.flac"},
            {"bytes": b"", "path": "gone.flac"},
            {"bytes": None, "path": None},
            None,
            {"bytes": flac(1), "path": "a/x.wav"},
        ],
        "text": ["A", "B", "C", "D", "E", None],
        "id": [None, "two", "", None, None, None],
        "speaker": ["s", None, None, None, None, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    found = [(u.key, u.text, u.speaker, pack(u).reason) for u in listed(tmp_path / "x.parquet")]
    assert found == [
        ("row-0", "A", "s", ""),
        ("two", "B", "", ""),
        ("gone", "C", "", MISSING_AUDIO),
        ("row-3", "D", "", MISSING_AUDIO),
        ("row-4", "E", "", MISSING_AUDIO),
        ("a_x", None, "", MISSING_TRANSCRIPT),
    ]


@pytest.mark.parametrize(
    "table",
    [
        {"key": ["a"], "text": ["A"]},
        {"audio": ["a.wav"], "text": ["A"]},
        {"audio": [{"bytes": b"", "path": ""}], "words": ["A"]},
        {"audio": [{"bytes": b"", "path": ""}], "text": [5]},
        {"one": [{"bytes": b"", "path": ""}], "two": [{"bytes": b"", "path": ""}], "text": ["A"]},
    ],
)
def test_a_table_without_audio_or_text_says_which_columns_were_seen(tmp_path, table):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"needs a column `audio` of structs .* its columns are ") as refused:
        listed(tmp_path)
    assert all(f"{name} (" in str(refused.value) for name in table)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_files_that_are_missing_or_left_over_are_refused(tmp_path, rows, change):
    dataset = tiny_speech.huggingface(rows)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    if change == "missing":
        (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    else:
        (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"some are missing or left over; save the dataset again"):
        listed(tmp_path / "saved")


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_file_that_is_cut_anywhere_is_refused_in_one_sentence(tmp_path, rows, form):
    dataset = tiny_speech.huggingface(rows)
    if form == "arrow":
        with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), dataset.data.table.schema) as writer:
            writer.write_table(dataset.data.table, max_chunksize=2)
    else:
        dataset.to_parquet(tmp_path / "x.parquet", batch_size=2)
    path = tmp_path / f"x.{form}"
    whole = path.read_bytes()
    assert len(listed(path)) == 5
    for size in [*range(0, len(whole), 97), *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"x.{form} is damaged or cut short \("):
            listed(path)


def test_only_a_few_rows_are_in_memory(tmp_path, rows, monkeypatch):
    """Rows come out before the second file is opened."""
    tiny_speech.huggingface(rows).save_to_disk(tmp_path / "saved", num_shards=2)
    _, utterances = open_source(str(tmp_path / "saved"), SourceOptions()).open()
    next(utterances)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow is damaged or cut short \(.*No such file"):
        list(utterances)


def test_shards_of_a_dataset(tmp_path, rows, expected):
    tiny_speech.huggingface(rows).save_to_disk(tmp_path / "saved")
    shards = tiny_speech.shard(tmp_path / "saved", tmp_path / "shards", "--verify", "--strict")
    assert read_index([shards]).keys.to_pylist() == [key for key, *_ in expected]
