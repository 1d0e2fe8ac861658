"""Sources of `ddp_asr.shard` and audio files: manifests, directories, archives, recordings."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import warnings
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile

from ddp_asr.data.audio import pack
from ddp_asr.data.sources import REASONS, Source, SourceOptions, Utterance, open_source
from ddp_asr.recognition.transcription import read_audio
from tests.fuzz.mutate import (
    Fifo,
    Folder,
    Link,
    Tree,
    mutate_bytes,
    mutate_file,
    mutate_text,
)
from tests.fuzz.target import Refused, Target, Wrong
from tests.tiny_recogniser import noises

AUDIO = {  # name -> (format, subtype, rate)
    "flac": ("FLAC", "PCM_16", 16_000),
    "flac24": ("FLAC", "PCM_24", 44_100),
    "wav": ("WAV", "PCM_16", 16_000),
    "float": ("WAV", "FLOAT", 22_050),
    "ulaw": ("WAV", "ULAW", 8_000),
    "adpcm": ("WAV", "IMA_ADPCM", 8_000),
    "ogg": ("OGG", "VORBIS", 16_000),
    "opus": ("OGG", "OPUS", 16_000),
    "mp3": ("MP3", "MPEG_LAYER_III", 16_000),
    "aiff": ("AIFF", "PCM_16", 16_000),
    "au": ("AU", "PCM_16", 16_000),
    "w64": ("W64", "PCM_16", 16_000),
    "caf": ("CAF", "ALAC_16", 16_000),
}


def encoded(kind: str, seconds: float = 0.25) -> bytes:
    """The same noise in each format; the same bytes each time."""
    form, subtype, rate_hz = AUDIO[kind]
    waveform = noises(seconds * rate_hz / 16_000, seed=5)
    file = io.BytesIO()
    soundfile.write(file, waveform / 32768, rate_hz, format=form, subtype=subtype)
    return with_ogg_checksums(file.getvalue(), serial=7) if form == "OGG" else file.getvalue()


def with_ogg_checksums(data: bytes, serial: int | None = None) -> bytes:
    """Every Ogg page with the checksum of its content, which the decoder compares; without it no change gets further.

    `serial`: the number of the stream, which libsndfile draws by the clock.
    """
    found, place = bytearray(data), data.find(b"OggS")
    while 0 <= place <= len(found) - 27:
        segments = found[place + 27 : place + 27 + found[place + 26]]
        end = place + 27 + len(segments) + sum(segments)
        if serial is not None:
            found[place + 14 : place + 18] = serial.to_bytes(4, "little")
        found[place + 22 : place + 26] = bytes(4)
        found[place + 22 : place + 26] = _ogg_crc(found[place:end]).to_bytes(4, "little")
        place = found.find(b"OggS", max(end, place + 1))
    return bytes(found)


def _table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
        table.append(crc & 0xFFFFFFFF)
    return table


_OGG_TABLE = _table()


def _ogg_crc(page: bytes | bytearray) -> int:
    crc = 0
    for byte in page:
        crc = ((crc << 8) & 0xFFFFFFFF) ^ _OGG_TABLE[(crc >> 24) ^ byte]
    return crc


def read_all(source: Source) -> list[Utterance]:
    """The utterances, which must keep the rules that every source has to keep."""
    json.dumps(source.identity).encode()
    total, utterances = source.open()
    listed = list(utterances)
    if len(listed) != total:
        raise Wrong(f"{len(listed)} utterances, and {total} were announced")
    for utterance in listed:
        if any(c in "./ " or c < " " for c in utterance.key):
            raise Wrong(f"the key {utterance.key!r} has a character that no key may have")
        if utterance.reason and utterance.reason not in REASONS:
            raise Wrong(f"the reason {utterance.reason!r} is in no list")
        strings = (utterance.key, utterance.source, utterance.speaker, utterance.language, utterance.detail)
        for text in (*strings, utterance.text or ""):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise Wrong(f"{text!r} cannot be written as UTF-8") from None
    return listed


class Manifest(Target):
    """JSONL manifests"""

    name = "manifest"
    share = 120
    mutated = ("mine.jsonl",)

    def seeds(self) -> list[Tree]:
        lines: list[dict] = [
            {"audio_filepath": "a.flac", "text": "HELLO THERE", "duration": 0.25, "speaker": "me", "id": "a"},
            {"audio_filepath": "b.wav", "text": "GOOD BYE", "offset": 0.05, "duration": 0.1},
            {"audio_filepath": "./b.wav", "text": "Übermut", "offset": 0, "other": [1, {"x": None}]},
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        return [{"mine.jsonl": text, "a.flac": encoded("flac"), "b.wav": encoded("wav")}]

    def read(self, directory: Path) -> None:
        utterances = read_all(open_source(str(directory / "mine.jsonl"), SourceOptions()))
        for utterance in utterances[:4]:
            pack(utterance, max_seconds=60)


class Tables(Target):
    """Tables, Kaldi data directories, folders of audio with their texts"""

    name = "table"
    share = 120
    mutated = ("mine.csv", "validated.tsv", "text", "wav.scp", "segments", "utt2spk", "a.txt", "b.lab")

    def seeds(self) -> list[Tree]:
        audio: Tree = {"a.flac": encoded("flac"), "b.wav": encoded("wav")}
        rows = 'path,text,start,end,locale\na.flac,HELLO,0.05,0.2,en\nb.wav,"GOOD ""BYE""",,,de\n'
        common_voice = 'client_id\tpath\tsentence\nme\ta.flac\t"Hello\nyou\tb.wav\t\u00dcbermut\n'
        files = {"text": "a A TEXT\nb B\n", "wav.scp": "x a.flac\ny b.wav\nz true |\n", "utt2spk": "a me\nb you\n"}
        files["segments"] = "a x 0.05 0.2\nb y 0 -1\nc z 0 1\n"
        trees = [
            {"mine.csv": rows},
            {"validated.tsv": common_voice},
            files,
            {"a.txt": "ONE\nTWO\n", "b.lab": "THREE\n"},
        ]
        return [{**audio, **{name: text.encode() for name, text in tree.items()}} for tree in trees]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        name = random.choice([name for name in tree if name in self.mutated])
        content = tree[name]
        assert isinstance(content, bytes)
        return {**tree, name: mutate_text(content, random)}

    def read(self, directory: Path) -> None:
        table = next((path for path in directory.iterdir() if path.suffix in (".csv", ".tsv")), directory)
        for utterance in read_all(open_source(str(table), SourceOptions()))[:4]:
            pack(utterance, max_seconds=60)


class Directory(Target):
    """LibriSpeech directories: transcripts, names, links, FIFOs"""

    name = "directory"
    share = 60

    def seeds(self) -> list[Tree]:
        return [_librispeech()]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        return _other_layout(tree, random)

    def read(self, directory: Path) -> None:
        for utterance in read_all(open_source(str(directory / "corpus"), SourceOptions())):
            pack(utterance, max_seconds=60)


def _librispeech() -> Tree:
    tree: Tree = {}
    for speaker in ("12", "34"):
        folder = f"corpus/{speaker}/7"
        tree[f"{folder}/{speaker}-7.trans.txt"] = "".join(
            f"{speaker}-7-000{n} THE TEXT OF {n}\n" for n in range(2)
        ).encode()
        for n, kind in enumerate(("flac", "ulaw")):
            tree[f"{folder}/{speaker}-7-000{n}.{'flac' if kind == 'flac' else 'wav'}"] = encoded(kind, 0.1)
    return tree


def _other_layout(tree: Tree, random: Random) -> Tree:
    """The directory with changed transcripts, moved and renamed files, and things that are no files."""
    tree = dict(tree)
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(list(tree))
        content, folder = tree[name], name.rpartition("/")[0]
        change = random.randrange(7)
        if change <= 1 and isinstance(content, bytes):
            tree[name] = (mutate_text if name.endswith(".txt") else mutate_bytes)(content, random)
        elif change == 2:
            tree[f"{folder}/{random.choice(_NAMES)}"] = content
        elif change == 3:
            tree[f"{folder}/{random.choice(('', '._', '.', '~'))}{random.choice(_NAMES)}"] = tree.pop(name)
        elif change == 4:
            links = ("..", ".", "/", "nowhere", "/dev/zero", "/dev/stdin", "12-7-0000.flac", "self.flac", "../../..")
            tree[f"{folder}/{random.choice(('self.flac', 'x', 'x.trans.txt'))}"] = Link(random.choice(links))
        elif change == 5:
            place = random.choice((name, f"{folder}/new.flac", f"{folder}/new.trans.txt"))
            tree[place] = random.choice((Fifo(), Folder(), b""))
        elif len(tree) > 1:
            del tree[name]
    if not any(name.startswith("corpus") for name in tree):
        tree["corpus"] = Folder()
    return _without_conflicts(tree)


_NAMES = (
    *("12-7-0000.flac", "12-7-0000.wav", "12-7.trans.txt", "a.b.c.flac", "a b.flac", "ä.flac", ".flac", "x.trans.txt"),
    *(
        "-.flac",
        "x\ny.flac",
        "x\x1b.flac",
        "\udcff.flac",
        "\udcff.trans.txt",
        "x.FLAC",
        "a" * 240 + ".flac",
        ".trans.txt",
    ),
    *("\u2028.flac", "e\u0301.flac", "\u00e9.flac", "%s.flac", "$(x).flac"),
)


def _without_conflicts(tree: Tree) -> Tree:
    """Without names that lie below something that is no directory."""
    return {name: content for name, content in tree.items() if not any(name.startswith(f"{above}/") for above in tree)}


class Archive(Target):
    """LibriSpeech archives: members, tar headers, the compressed stream"""

    name = "archive"
    share = 100

    def seeds(self) -> list[Tree]:
        return [{"dev.tar.gz": _compressed(_tar(_librispeech(), None))}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        kind = random.random()
        if kind < 0.2:
            data = tree["dev.tar.gz"]
            assert isinstance(data, bytes)
            return {"dev.tar.gz": mutate_bytes(data, random)}
        if kind < 0.6:
            tar = _tar(_librispeech(), random if random.random() < 0.3 else None)
            return {"dev.tar.gz": _compressed(_with_tar_checksums(mutate_bytes(tar, random), random))}
        layout = _librispeech() if random.random() < 0.4 else _other_layout(_librispeech(), random)
        return {"dev.tar.gz": _compressed(_tar(layout, random))}

    def read(self, directory: Path) -> None:
        for utterance in read_all(open_source(str(directory / "dev.tar.gz"), SourceOptions())):
            pack(utterance, max_seconds=60)
        if [path.name for path in directory.iterdir()] != ["dev.tar.gz"]:
            raise Wrong("reading an archive has written files")


def _compressed(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)


def _tar(tree: Tree, random: Random | None) -> bytes:
    """The tree as a tar; with `random`, in any order and with members that a crafted archive may have."""
    file = io.BytesIO()
    members = list(tree.items())
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        if random is not None:
            random.shuffle(members)
        for name, content in members:
            if random is not None and random.random() < 0.1:
                name = random.choice(
                    ("../../escape.flac", "/tmp/escape.flac", f"./{name}", f"x/../{name}", name * 9, "")
                )
            with contextlib.suppress(ValueError, UnicodeError):  # a name that no tar can hold
                tar.addfile(*_member(name, content, random))
    return file.getvalue()


def _member(name: str, content: object, random: Random | None) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    data = content if isinstance(content, bytes) else b""
    info.size = len(data)
    if isinstance(content, Link):
        info.type, info.linkname = tarfile.SYMTYPE, content.to
    elif isinstance(content, Fifo | Folder):
        info.type = tarfile.FIFOTYPE if isinstance(content, Fifo) else tarfile.DIRTYPE
    elif random is not None and random.random() < 0.1:
        info.type = random.choice((tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z"))
    if random is not None and random.random() < 0.15:
        keys = (
            "path",
            "size",
            "mtime",
            "linkpath",
            "GNU.sparse.map",
            "GNU.sparse.size",
            "GNU.sparse.major",
            "hdrcharset",
        )
        values = ("", "-1", "nan", "1e999", "x", "9" * 30, "../../x", "BINARY", "1,2,3", "0,99999999999")
        info.pax_headers = {random.choice(keys): random.choice(values) for _ in range(random.choice((1, 2)))}
    return info, io.BytesIO(data)


def _with_tar_checksums(tar: bytes, random: Random) -> bytes:
    """Mostly with right checksums in all headers, and sometimes with an extreme field in one."""
    blocks = [tar[place : place + 512] for place in range(0, len(tar), 512)]
    headers = [place for place, block in enumerate(blocks) if block[257:262] == b"ustar"]
    if headers and random.random() < 0.5:
        place = random.choice(headers)
        start, size = random.choice(
            ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
        )
        filler = random.choice((bytes(size), b"\xff" * size, b"7" * size, b"\x80" + b"\1" * size, b"-1" + bytes(size)))
        blocks[place] = blocks[place][:start] + filler[:size].ljust(size, b"\0") + blocks[place][start + size :]
    if random.random() < 0.8:
        for place in headers:
            block = blocks[place][:148] + b" " * 8 + blocks[place][156:]
            blocks[place] = block[:148] + b"%06o\0 " % sum(block) + block[156:]
    return b"".join(blocks)


class Lhotse(Target):
    """Manifests of lhotse: cuts, recordings and supervisions"""

    name = "lhotse"
    share = 60

    def seeds(self) -> list[Tree]:
        source = {"type": "file", "channels": [0], "source": "../a.flac"}
        recording = {"id": "r", "sources": [source], "sampling_rate": 16_000, "num_samples": 4_000, "duration": 0.25}
        said = {"id": "u", "recording_id": "r", "start": 0, "duration": 0.25, "channel": 0, "text": "HELLO"}
        cut = {"id": "c", "start": 0, "duration": 0.25, "channel": 0, "supervisions": [said], "recording": recording}
        part = {**cut, "type": "MonoCut", "start": 0.05, "duration": 0.1, "supervisions": [{**said, "duration": 0.1}]}
        files = {"cuts": [cut, part], "recordings": [recording], "supervisions": [said, {**said, "id": "v"}]}
        lines = {name: "".join(json.dumps(each) + "\n" for each in entries).encode() for name, entries in files.items()}
        plain = {f"set/{name}.jsonl": content for name, content in lines.items()}
        packed = {f"{name}.gz": _compressed(content) for name, content in plain.items()}
        seeds: list[Tree] = []
        for tree in (plain, packed):
            cuts, recordings, supervisions = tree.items()
            seeds += [dict([cuts]), dict([recordings, supervisions])]
        return [{**tree, "a.flac": encoded("flac")} for tree in seeds]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        return mutate_file(tree, random.choice([name for name in tree if name.startswith("set/")]), random)

    def read(self, directory: Path) -> None:
        for utterance in read_all(open_source(str(directory / "set"), SourceOptions()))[:4]:
            pack(utterance, max_seconds=60)


class HuggingFace(Target):
    """Datasets of Hugging Face: arrow streams and parquet files"""

    name = "huggingface"
    share = 60

    def seeds(self) -> list[Tree]:
        rows = {
            "audio": [{"bytes": encoded("flac", 0.1), "path": "a.flac"}, {"bytes": None, "path": "b.wav"}, None],
            "text": ["ONE", "Übermut", None],
            "id": ["a", "b", "c"],
            "speaker_id": [1, 2, None],
            "language": ["de", None, ""],
        }
        table = pyarrow.table(rows)
        arrow, parquet = io.BytesIO(), io.BytesIO()
        with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        pyarrow.parquet.write_table(table, parquet, row_group_size=2)
        return [{"x.arrow": arrow.getvalue()}, {"x.parquet": parquet.getvalue()}]

    def read(self, directory: Path) -> None:
        path = next(directory.iterdir(), directory / "x.parquet")
        for utterance in read_all(open_source(str(path), SourceOptions()))[:4]:
            pack(utterance, max_seconds=60)


class WebDataset(Target):
    """WebDataset tars"""

    name = "webdataset"
    share = 60

    def seeds(self) -> list[Tree]:
        return [{"a.tar": _tar(self._samples(), None)}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        samples = self._samples()
        if random.random() < 0.4:
            name = random.choice([name for name in samples if name.endswith(("txt", "json"))])
            samples = mutate_file(samples, name, random)
        tar = _tar(samples, random if random.random() < 0.4 else None)
        return {"a.tar": _with_tar_checksums(mutate_bytes(tar, random), random) if random.random() < 0.6 else tar}

    def read(self, directory: Path) -> None:
        for utterance in read_all(open_source(str(directory / "a.tar"), SourceOptions())):
            pack(utterance, max_seconds=60)

    def _samples(self) -> Tree:
        tree: Tree = {}
        for key, kind in (("a", "flac"), ("b/c", "wav"), ("d", "ogg")):
            tree[f"{key}.{kind}"] = encoded(kind, 0.1)
            tree[f"{key}.json"] = json.dumps({"text": "A B", "speaker": 1, "language": "de"}).encode()
            tree[f"{key}.txt"] = "ONE Übermut".encode()
        return tree


class Zip(Target):
    """Archives of audio without transcripts: a .zip"""

    name = "zip"
    share = 40
    mutated = ("noises.zip",)

    def seeds(self) -> list[Tree]:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as members:
            for name, kind in (("a/hum.wav", "wav"), ("a/b/street.flac", "flac"), ("read me.txt", "au")):
                method = zipfile.ZIP_STORED if kind == "flac" else zipfile.ZIP_DEFLATED
                members.writestr(zipfile.ZipInfo(name), encoded(kind, 0.1), method)
        return [{"noises.zip": file.getvalue()}]

    def read(self, directory: Path) -> None:
        source = open_source(str(directory / "noises.zip"), SourceOptions(no_text=True))
        for utterance in read_all(source):
            pack(utterance, max_seconds=60)


class Audio(Target):
    """Audio files of a source: WAV, FLAC, OGG, Opus, MP3, AIFF, AU, W64, CAF"""

    name = "audio"
    share = 160

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        flac = encoded("flac")
        self.samples, self.rate_and_channels = _md5_of_samples(flac), flac[18:21]

    def seeds(self) -> list[Tree]:
        return [{f"audio.{kind}": encoded(kind)} for kind in AUDIO]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        ((name, data),) = tree.items()
        assert isinstance(data, bytes)
        # Headers decide more than samples do.
        head = random.choice((64, 300, len(data)))
        data = mutate_bytes(data[:head], random) + data[head:] if random.random() < 0.6 else mutate_bytes(data, random)
        if data[:4] == b"OggS" and random.random() < 0.8:
            data = with_ogg_checksums(data)
        return {name: data}

    def read(self, directory: Path) -> None:
        (path,) = directory.iterdir()
        packed = pack(Utterance("a", "a", "TEXT", path=path), max_seconds=60)
        if packed.reason:
            raise Refused(f"{packed.reason}: {_one_line(packed.detail)}")
        decoded, rate_hz = soundfile.read(io.BytesIO(packed.flac), dtype="int16", always_2d=True)
        if (rate_hz, decoded.shape) != (16_000, (packed.samples, 1)):
            raise Wrong(f"packed as {packed.samples} samples, and {decoded.shape} at {rate_hz} Hz decode")
        # The MD5 in a FLAC covers its samples: where it still stands there, they must be what they were. It does not
        # cover their rate and channels, by which they are resampled and mixed.
        data = path.read_bytes()
        same_md5 = path.suffix == ".flac" and data[:4] == b"fLaC" and data[26:42] == bytes.fromhex(self.samples)
        if (
            same_md5
            and data[18:21] == self.rate_and_channels
            and hashlib.md5(decoded.tobytes()).hexdigest() != self.samples
        ):
            raise Wrong("other samples than those that the FLAC's MD5 covers")


def _one_line(text: str) -> str:
    """libsndfile ends its sentences with a line feed, and details of an utterance may have one."""
    return " ".join(text.split())


def _md5_of_samples(flac: bytes) -> str:
    samples, _ = soundfile.read(io.BytesIO(flac), dtype="int16")
    return hashlib.md5(samples.tobytes()).hexdigest()


class Recording(Audio):
    """Audio files that are transcribed"""

    name = "recording"
    share = 90

    def read(self, directory: Path) -> None:
        (path,) = directory.iterdir()
        with warnings.catch_warnings():
            waveform = read_audio(str(path))
        if waveform.dtype != np.int16 or waveform.ndim != 1 or not len(waveform):
            raise Wrong(f"{waveform.dtype} {waveform.shape} came of it")
