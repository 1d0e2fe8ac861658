"""What is in sources and shards before anything is trained: numbers for a person, and a proposed vocabulary.

    sources, shards --read--> Corpus: a row for each usable utterance, with its audio measured if it is in the sample
    Corpus --report--> Report: lengths, speakers, words, characters, duplicates, doubtful audio, what is left out

The sample is drawn by the hash of the key, so it is the same in every call. A corpus is columns of Arrow and counters,
without an object for each utterance.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as compute
import pyarrow.parquet

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.config import config_from_dict
from ddp_asr.data import flac
from ddp_asr.data.audio import Packed, check_listed, pack
from ddp_asr.data.index import key_hashes, read_dataset_json, read_index
from ddp_asr.data.sources import DUPLICATE, MISSING_AUDIO, SourceOptions, Utterance, open_source
from ddp_asr.data.storage import Shards, scheme_of
from ddp_asr.data.threads import in_order
from ddp_asr.errors import UserError
from ddp_asr.text import make_tokeniser
from ddp_asr.text.alphabet import Alphabet, propose

ROW = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("key_hash", pyarrow.uint64()),
        ("text", pyarrow.string()),
        ("speaker", pyarrow.string()),
        ("reason", pyarrow.string()),  # why it is unusable; "": it is usable as far as is known
        ("detail", pyarrow.string()),
        ("tried", pyarrow.bool_()),  # whether its audio was to be decoded
        ("seconds", pyarrow.float64()),  # decoded, of the index, or as the source states; null: unknown
        ("level_dbfs", pyarrow.float64()),  # this and what follows is null where no audio was decoded
        ("full_scale", pyarrow.float64()),  # share of the samples
        ("digest", pyarrow.uint64()),  # of the decoded samples
    ]
)
QUIET_DBFS = -60.0
CLIPPED_SHARE = 0.001  # of the samples at full scale
TOO_FAST, TOO_SLOW = 3.0, 1 / 6  # characters a second, in medians of the corpus
LARGE_ALPHABET = 200  # symbols, beyond which pieces are proposed, too
MAX_PIECES = 32_768
LISTED = 10  # examples of each kind
HISTOGRAM_BINS = 12
_BLOCK = 1 << 14  # utterances handled as Python objects at once

# an utterance, and what reads its FLAC where that is in shards
Item = tuple[Utterance, Callable[[], bytes] | None]


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """N usable utterances, and how many there are in all."""

    table: pyarrow.Table  # of ROW, (N,)
    utterances: int
    decoded: int  # or tried
    seconds_are: str  # "measured", "stated" or "estimated"
    unusable: list[dict[str, Any]]  # reason, utterances, whether only decoding shows it, an example


def is_shards(name: str) -> bool:
    """Whether it is a shard directory or a URL, and no source."""
    return bool(scheme_of(name)) or Path(name, "dataset.json").exists()


def read(
    names: Sequence[str],
    options: SourceOptions,
    *,
    sample: int,
    workers: int,
    most: int | None = None,
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda rows, total: rows,
) -> Corpus:
    """The first `most` utterances of all inputs as one corpus; the audio of about `sample` of them is decoded.

    Raises:
        UserError: an input cannot be read, or nothing in it can be used.
    """
    inputs = [_open_shards(name) if is_shards(name) else _open_source(name, options) for name in names]
    total = sum(number for number, _ in inputs)
    total = total if most is None else min(total, most)
    items = itertools.islice(itertools.chain.from_iterable(each for _, each in inputs), total)
    blocks = [ROW.empty_table()]
    with contextlib.closing(in_order(_row, items, workers, sample / max(1, total))) as rows:
        tracked = iter(track(rows, total))
        while block := [row for _, row in itertools.islice(tracked, _BLOCK)]:
            columns = [
                pyarrow.array(values, kind) for values, kind in zip(zip(*block, strict=True), ROW.types, strict=True)
            ]
            blocks.append(pyarrow.table(columns, schema=ROW))
    everything = pyarrow.concat_tables(blocks)
    table = everything.filter(compute.equal(everything["reason"], ""))
    first = np.sort(np.unique(table["key_hash"].to_numpy(), return_index=True)[1])
    unusable = _unusable(everything, table, first)
    if not len(first):
        found = "; ".join(f"{each['utterances']:,} x {each['reason']} ({each['example']})" for each in unusable[:3])
        raise UserError(f"{', '.join(names)}: no utterance can be used: {found or 'it is empty'}")
    table = table.take(first)
    seconds_are = "stated" if not table["seconds"].null_count else "estimated"
    if all(map(is_shards, names)) or not table["level_dbfs"].null_count:
        seconds_are = "measured"
    for name in filter(is_shards, names):
        for reason, count in read_dataset_json(name)["dropped"].items():
            example = f"see {name}/dropped.jsonl"
            unusable.append({"reason": reason, "utterances": count, "only_in_sample": False, "example": example})
    return Corpus(table, len(everything), compute.sum(everything["tried"]).as_py() or 0, seconds_are, unusable)


def _open_source(name: str, options: SourceOptions) -> tuple[int, Iterator[Item]]:
    total, utterances = open_source(name, options).open()
    return total, ((utterance, None) for utterance in utterances)


def _open_shards(directory: str) -> tuple[int, Iterator[Item]]:
    index = read_index([directory])
    shards = Shards(index.shards)

    def items() -> Iterator[Item]:
        for row in range(len(index)):
            place = (int(index.shard[row]), int(index.offset[row]), int(index.bytes[row]))
            seconds, key = int(index.samples[row]) / SAMPLE_RATE_HZ, index.key(row)
            utterance = Utterance(key, key, index.text(row), index.speaker(row), duration_s=seconds, has_text=False)
            yield utterance, functools.partial(shards.read, *place)

    return len(index), items()


def _row(item: Item, share: float) -> tuple[Any, ...]:
    """A row of ROW; the audio is decoded if the key's hash is in the lowest `share` of all."""
    utterance, load = item
    key_hash = int(key_hashes([utterance.key])[0])
    start = (utterance.key, key_hash, (utterance.text or "").strip(), utterance.speaker)
    refused = check_listed(utterance)
    if refused or key_hash >= share * 2**64:
        why = (refused.reason, refused.detail) if refused else ("", "")
        return (*start, *why, False, utterance.duration_s, None, None, None)
    try:
        packed = pack(utterance if load is None else replace(utterance, data=load()))
    except OSError as error:  # of the store
        packed = Packed(reason=MISSING_AUDIO, detail=str(error))
    if packed.reason:
        return (*start, packed.reason, packed.detail, True, None, None, None, None)
    waveform = np.empty(packed.samples, np.int16)
    flac.decode(packed.flac, packed.samples, waveform)
    return (*start, "", "", True, *measure(waveform))


def measure(waveform: np.ndarray) -> tuple[float, float, float, int]:
    """Seconds, level in dBFS, share of samples at full scale, and checksum of int16 (S,)."""
    power = float(np.mean(np.square(waveform, dtype=np.float64))) / 2**30
    full_scale = float(np.mean((waveform == 32767) | (waveform == -32768)))
    digest = int.from_bytes(blake2b(waveform.tobytes(), digest_size=8).digest(), "little")
    return len(waveform) / SAMPLE_RATE_HZ, 10 * math.log10(max(power, 1e-12)), full_scale, digest


def _unusable(everything: pyarrow.Table, usable: pyarrow.Table, first: np.ndarray) -> list[dict[str, Any]]:
    """Reasons, the most frequent first; `first` are the usable rows that do not repeat the key of another."""
    rows = everything.filter(compute.not_equal(everything["reason"], ""))
    counts, examples = Counter[tuple[str, bool]](), dict[tuple[str, bool], str]()
    for row in rows.select(["key", "reason", "detail", "tried"]).to_pylist():
        kind = (row["reason"], row["tried"])
        counts[kind] += 1
        examples.setdefault(kind, f"{row['key']}: {row['detail']}" if row["detail"] else row["key"])
    if repeated := len(usable) - len(first):
        counts[DUPLICATE, False] += repeated
        again = np.setdiff1d(np.arange(len(usable)), first)[0]
        examples.setdefault((DUPLICATE, False), usable["key"][int(again)].as_py())
    return [
        {"reason": reason, "utterances": count, "only_in_sample": tried, "example": examples[reason, tried]}
        for (reason, tried), count in counts.most_common()
    ]


# ---- what is in it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """What a vocabulary cannot write."""

    utterances: int = 0
    hours: float = 0.0
    empty: int = 0  # utterances without a symbol after normalisation
    characters: list[dict[str, Any]] = field(default_factory=list)  # each with utterances, hours and an example
    problem: str = ""  # why no tokeniser can be made of the settings


@dataclass(frozen=True)
class Proposed:
    """Settings to paste, and what a tokeniser made from them leaves out."""

    kind: str
    yaml: str
    reasons: list[str]
    left_out: Coverage


@dataclass(frozen=True)
class Report:
    """All that is said of a corpus; hours are exact if `seconds_are` is "measured"."""

    utterances: int
    usable: int
    decoded: int
    unusable: list[dict[str, Any]]
    seconds_are: str
    hours: float
    lengths_s: dict[str, float]
    histogram: list[tuple[float, int]]  # from which length on, utterances
    speakers: dict[str, Any]
    words: dict[str, Any]
    characters: list[dict[str, Any]]  # as they are written, the rarest first
    not_nfc: int  # texts that normalisation to NFC changes
    equal_texts: dict[str, Any]
    equal_audio: list[list[str]]  # keys, within what was decoded
    full_scale: float | None  # share of the samples
    clipped: dict[str, Any]
    quiet: dict[str, Any]
    too_fast: dict[str, Any]
    too_slow: dict[str, Any]
    left_out: Coverage  # by the given vocabulary
    proposed: list[Proposed]


def report(corpus: Corpus, vocabulary: Any, pieces: bool = False) -> Report:
    """`vocabulary` is a section of settings; with `pieces` those are proposed for any alphabet."""
    table, alphabet = corpus.table, Alphabet()
    for block in _blocks(table["text"]):
        alphabet.add(block)
    section, reasons = propose(alphabet)
    words = alphabet.spoken_words(section["drop"])
    characters = compute.utf8_length(table["text"]).to_numpy().astype(float)
    given = table["seconds"].to_numpy()  # NaN where unknown
    seconds, known = _estimate(given, characters), given[~np.isnan(given)]
    table = table.append_column("estimated_seconds", pyarrow.array(seconds))
    level, full_scale = (table[name].to_numpy() for name in ("level_dbfs", "full_scale"))
    rate = np.divide(characters, given, out=np.full(len(given), np.nan), where=(given > 0) & (characters > 0))
    usual = float(np.median(rate[~np.isnan(rate)])) if not np.isnan(rate).all() else 0.0
    weight = np.where(np.isnan(full_scale), 0.0, seconds)
    quantiles = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return Report(
        utterances=corpus.utterances,
        usable=len(table),
        decoded=corpus.decoded,
        unusable=corpus.unusable,
        seconds_are=corpus.seconds_are,
        hours=float(seconds.sum()) / 3600,
        lengths_s={name: float(np.quantile(known, share)) for name, share in quantiles.items() if len(known)},
        histogram=histogram(known),
        speakers=_speakers(table),
        words={
            "running": words.total(),
            "distinct": len(words),
            "per_second": words.total() / max(float(seconds.sum()), 1e-9),
            "most_frequent": words.most_common(LISTED),
        },
        characters=_characters(alphabet, table),
        not_nfc=alphabet.not_nfc,
        equal_texts=_equal_texts(table["text"]),
        equal_audio=_equal_audio(table),
        full_scale=float(np.nansum(full_scale * weight) / weight.sum()) if weight.any() else None,
        clipped=_outside(table, full_scale, CLIPPED_SHARE, 1),
        quiet=_outside(table, level, QUIET_DBFS, -1),
        too_fast=_outside(table, rate, TOO_FAST * usual, 1),
        too_slow=_outside(table, rate, TOO_SLOW * usual, -1),
        left_out=find_left_out(vocabulary, table),
        proposed=_proposed(section, reasons, table, pieces),
    )


def _blocks(texts: pyarrow.ChunkedArray) -> Iterator[list[str]]:
    for start in range(0, len(texts), _BLOCK):
        yield texts.slice(start, _BLOCK).to_pylist()


def _estimate(seconds: np.ndarray, characters: np.ndarray) -> np.ndarray:
    """Unknown lengths (NaN) as long a character as the known ones, or as the mean of these where there is no text."""
    known = ~np.isnan(seconds)
    if not known.any():
        return np.zeros(len(seconds))
    written = characters[known].sum()
    estimate = characters * (seconds[known].sum() / written) if written else seconds[known].mean()
    return np.where(known, seconds, estimate)


def histogram(seconds: np.ndarray) -> list[tuple[float, int]]:
    """(from, number) of bins of a round width; the last one, near the longest of 99.5 %, has all longer ones, too."""
    if not len(seconds):
        return []
    least = max(float(np.quantile(seconds, 0.995)) / HISTOGRAM_BINS, 1e-3)
    scale = 10.0 ** math.floor(math.log10(least))
    width = next(width for width in (scale, 2 * scale, 5 * scale, 10 * scale) if width >= 0.999 * least)
    places = np.floor(seconds / width + 1e-6)  # 0.3 s, for instance, is rounded and belongs to the bin from 0.3 on
    counts = np.bincount(np.minimum(places, HISTOGRAM_BINS - 1).astype(int))
    return [(round(place * width, 6), int(count)) for place, count in enumerate(counts)]


def _speakers(table: pyarrow.Table) -> dict[str, Any]:
    named = table.filter(compute.not_equal(table["speaker"], ""))
    sums = named.group_by("speaker").aggregate([("estimated_seconds", "sum")])
    ranked = sums.sort_by([("estimated_seconds_sum", "descending"), ("speaker", "ascending")]).to_pylist()
    hours = [{"speaker": row["speaker"], "hours": row["estimated_seconds_sum"] / 3600} for row in ranked]
    ends = {"largest": hours[0], "smallest": hours[-1]} if hours else {}
    return {"number": len(hours), "utterances_without": len(table) - len(named), **ends}


def _characters(alphabet: Alphabet, table: pyarrow.Table) -> list[dict[str, Any]]:
    found = []
    for character, count in sorted(alphabet.characters.items(), key=lambda item: (item[1], item[0])):
        row = alphabet.first[character]
        text = table["text"][row].as_py()
        place = text.index(character)
        where = {"key": table["key"][row].as_py(), "example": text[max(0, place - 20) : place + 21]}
        counts = {"count": count, "utterances": alphabet.texts_with[character]}
        found.append({"character": character, **counts, **where, "note": alphabet.note(character)})
    return found


def _equal_texts(texts: pyarrow.ChunkedArray) -> dict[str, Any]:
    counts = compute.value_counts(texts.filter(compute.not_equal(texts, "")))
    counts = counts.filter(compute.greater(counts.field("counts"), 1))
    order = compute.sort_indices(counts.field("counts"), sort_keys=[("counts", "descending")])
    most = [(each["values"], each["counts"]) for each in counts.take(order[:LISTED]).to_pylist()]
    utterances = compute.sum(counts.field("counts")).as_py() or 0
    return {"texts": len(counts), "utterances": utterances, "most_frequent": most}


def _equal_audio(table: pyarrow.Table) -> list[list[str]]:
    decoded = table.filter(compute.is_valid(table["digest"]))
    by_digest = decoded.group_by("digest", use_threads=False).aggregate([("key", "list")])
    return [keys for keys in by_digest["key_list"].to_pylist() if len(keys) > 1]


def _outside(table: pyarrow.Table, values: np.ndarray, limit: float, sign: int) -> dict[str, Any]:
    """Utterances whose value is above the limit (sign 1) or below it (-1), the most extreme first; NaN is neither."""
    rows = np.flatnonzero(sign * values > sign * limit)
    listed = rows[np.argsort(-sign * values[rows], kind="stable")][:LISTED]
    shown = table.take(listed).select(["key", "seconds", "text"]).to_pylist()
    examples = [{**row, "value": float(value)} for row, value in zip(shown, values[listed], strict=True)]
    return {"limit": limit, "utterances": len(rows), "examples": examples}


def find_left_out(vocabulary: Any, table: pyarrow.Table) -> Coverage:
    """What a tokeniser of these settings leaves out, by the rules for transcripts in data/targets.py."""
    try:
        tokeniser = make_tokeniser(vocabulary, itertools.chain.from_iterable(_blocks(table["text"])))
    except UserError as error:
        return Coverage(len(table), float(compute.sum(table["estimated_seconds"]).as_py()) / 3600, problem=str(error))
    hours = table["estimated_seconds"].to_numpy() / 3600
    found: dict[str, dict[str, Any]] = {}
    left_out, empty = np.zeros(len(table), bool), 0
    rows = itertools.count()
    for counted in map(tokeniser.count, _blocks(table["text"])):
        # `rows` comes last, because zip takes one more number from what comes before the list that ends.
        for length, foreign, row in zip(counted.length.tolist(), counted.foreign, rows, strict=False):
            left_out[row] = bool(foreign) or not length
            empty += not foreign and not length
            for character in foreign:
                if character not in found:
                    new = {"character": character, "utterances": 0, "hours": 0.0, "key": table["key"][row].as_py()}
                    found[character] = new
                found[character]["utterances"] += 1
                found[character]["hours"] += float(hours[row])
    ranked = sorted(found.values(), key=lambda each: (-each["utterances"], each["character"]))
    return Coverage(int(left_out.sum()), float(hours[left_out].sum()), empty, ranked)


def _proposed(section: dict[str, Any], reasons: list[str], table: pyarrow.Table, pieces: bool) -> list[Proposed]:
    """Characters; word pieces of the same characters where the alphabet is large, or they are asked for."""
    symbols = len(section["symbols"])
    if not symbols:
        return []
    proposed = [_proof(section, reasons, table)]
    if pieces or symbols > LARGE_ALPHABET:
        # Transcripts that are too few for so many pieces have at least their characters.
        for size in (256 if symbols < 128 else 1 << (2 * symbols - 1).bit_length(), symbols + 1):
            settings = {**section, "kind": "pieces", "size": min(size, MAX_PIECES)}
            found = _proof(settings, [*reasons, f"{size} pieces, learnt from the transcripts by each run"], table)
            if not found.left_out.problem:
                return [*proposed, found]
    return proposed


def _proof(section: dict[str, Any], reasons: list[str], table: pyarrow.Table) -> Proposed:
    settings = config_from_dict({"vocabulary": section}, "the proposal").vocabulary
    text = "".join(f"  {name}: {_yaml(value)}\n" for name, value in section.items())
    return Proposed(section["kind"], f"vocabulary:\n{text}", reasons, find_left_out(settings, table))


def _yaml(value: Any) -> str:
    """A value of a setting, quoted like JSON, with escapes for what cannot be seen and might be lost when pasted."""
    written = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in written)
