"""`ddp-asr inspect`: what it says of sources and shards, and that the vocabulary it proposes leaves nothing out."""

import json

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import cli
from ddp_asr.config import config_from_dict, load_config
from ddp_asr.data import inspection
from ddp_asr.data.index import read_index
from ddp_asr.errors import UserError
from ddp_asr.text import make_tokeniser
from ddp_asr.text.alphabet import Alphabet, propose
from tests import tiny_speech

# name -> transcripts, and the symbols and dropped characters that are expected beyond letters
TEXTS = {
    "umlauts": (["Größe über alles", "ÄRGER im Öl"], "äöüß", ""),
    "decomposed": (["Gro\u0308\u00dfe u\u0308ber", "gr\u00f6\u00dfe"], "öüß", ""),
    "digits": (["route 66 west", "at 7 pm"], "0123456789", ""),
    "punctuation": (["Well, don't go!", "a well-known (old) man."], "'-", "!(),."),
    "signs": (["50% off & 3 €", "„So“ sagt er…"], "%&€", "„“…"),
    "Greek": (["Καλημέρα κόσμε", "ΟΔΟΣ"], "καλημέρός", ""),
    "Chinese": (["你好,世界", "世界。"], "你好世界", ",。"),
    "invisible": (["soft\u00adware zero\u200bwidth", "\ufeffmark"], "", "\u00ad\u200b\ufeff"),
    "white space": (["a\tb\u00a0c", " d\u2003e "], " ", ""),
}


def write(directory, texts, seconds=0.1, **more):
    """A manifest of noise with these transcripts."""
    entries = []
    for number, text in enumerate(texts):
        (directory / f"u{number}.flac").write_bytes(tiny_speech.encode(tiny_speech.noise(seconds, seed=number)))
        entries.append({"audio_filepath": f"u{number}.flac", "text": text, **more})
    return tiny_speech.manifest(directory / "corpus.jsonl", entries)


def inspected(capsys, *arguments):
    """The JSON of the command."""
    assert cli.main(["inspect", *map(str, arguments), "--workers", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def tokeniser_of(proposed, directory, texts):
    """Made from the proposed section as a user would: pasted into a file."""
    path = directory / "pasted.yaml"
    path.write_text("".join(f"# {reason}\n" for reason in proposed["reasons"]) + proposed["yaml"], encoding="utf-8")
    return make_tokeniser(load_config(path).vocabulary, texts)


# ---- the proposed vocabulary ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_the_proposed_vocabulary_leaves_nothing_out(name, tmp_path, capsys):
    texts, symbols, drop = TEXTS[name]
    (proposed,) = inspected(capsys, write(tmp_path, texts))["proposed"]
    assert proposed["left_out"]["utterances"] == 0
    tokeniser = tokeniser_of(proposed, tmp_path, texts)
    assert set(symbols) <= set(tokeniser.symbols) and not set(drop) & set(tokeniser.symbols)
    assert set(tokeniser.drop) == set(drop)
    for text in texts:
        assert tokeniser.decode(tokeniser.encode(text)) == tokeniser.normalise(text) != ""


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"]), max_size=20), min_size=1))
def test_any_transcript_can_be_written_in_the_proposed_vocabulary(texts):
    alphabet = Alphabet()
    alphabet.add(texts)
    section, reasons = propose(alphabet)
    assert all(reason.isprintable() for reason in reasons)
    if section["symbols"]:
        tokeniser = make_tokeniser(config_from_dict({"vocabulary": section}, "").vocabulary)
        assert not any(tokeniser.count(texts).foreign)


def test_what_a_vocabulary_leaves_out_is_named_with_the_reason(tmp_path, capsys):
    manifest = write(tmp_path, ["plain words", "Übung 1", "übung", "...", "bell\u0007"])
    report = inspected(capsys, manifest)
    left_out = report["left_out"]
    assert (left_out["utterances"], left_out["empty"]) == (4, 0)
    found = {each["character"]: (each["utterances"], each["key"]) for each in left_out["characters"]}
    assert found == {"ü": (2, "u1"), "1": (1, "u1"), ".": (1, "u3"), "\u0007": (1, "u4")}
    assert left_out["hours"] == pytest.approx(4 * 0.1 / 3600)
    (proposed,) = report["proposed"]
    # Nothing is said in "...", and no setting can name a control character.
    assert (proposed["left_out"]["utterances"], proposed["left_out"]["empty"]) == (2, 1)
    assert "no setting can name U+0007: transcripts with these characters stay left out" in proposed["reasons"]


def test_a_given_vocabulary_is_tried(tmp_path, capsys):
    manifest = write(tmp_path, ["Über uns", "abc"])
    config = tmp_path / "mine.yaml"
    config.write_text("vocabulary: {symbols: ' abcdefghijklmnopqrstuvwxyzü'}\n", encoding="utf-8")
    assert inspected(capsys, manifest)["left_out"]["utterances"] == 1
    assert inspected(capsys, manifest, "--config", config)["left_out"]["utterances"] == 0
    capitals = inspected(capsys, manifest, "--config", config, "--vocabulary.lowercase=false")["left_out"]
    assert [each["character"] for each in capitals["characters"]] == ["Ü"]
    pieces = inspected(capsys, manifest, "--vocabulary.kind=pieces", "--vocabulary.symbols= xy", "--vocabulary.size=3")
    assert pieces["left_out"]["problem"].startswith("there is no transcript of the characters")


@pytest.mark.parametrize(
    "texts", [["the cat sat"], [" ".join(map(chr, range(0x4E00, 0x4E00 + 250)))]], ids=["asked", "large"]
)
def test_word_pieces_are_proposed_when_asked_and_for_large_alphabets(texts, tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    options = ["--pieces"] if len(set(texts[0])) < 200 else []
    characters, pieces = inspected(capsys, write(tmp_path, texts), *options)["proposed"]
    assert (characters["kind"], pieces["kind"]) == ("characters", "pieces")
    assert pieces["left_out"]["utterances"] == 0
    tokeniser = tokeniser_of(pieces, tmp_path, texts)
    assert tokeniser.decode(tokeniser.encode(texts[0])) == texts[0]


def test_words_are_counted_without_punctuation(tmp_path, capsys):
    words = inspected(capsys, write(tmp_path, ["Yes, I do - yes!", "don't; do", "isn't"]))["words"]
    assert words["most_frequent"] == [["yes", 2], ["do", 2], ["i", 1], ["don't", 1], ["isn't", 1]]
    assert (words["running"], words["distinct"], words["per_second"]) == (7, 5, pytest.approx(7 / 0.3))


def test_letters_and_digits_that_are_rare_are_added(tmp_path, capsys):
    (proposed,) = inspected(capsys, write(tmp_path, ["the quick brown fox 4"]))["proposed"]
    assert set("adjlmpsvyz012356789") <= set(tokeniser_of(proposed, tmp_path, []).symbols)
    (proposed,) = inspected(capsys, write(tmp_path, ["ja nein"]))["proposed"]
    assert set(tokeniser_of(proposed, tmp_path, []).symbols) == set("ja nein")


# ---- characters -----------------------------------------------------------------------------------------------------


def test_characters_are_counted_with_an_example_and_what_is_odd_about_them(tmp_path, capsys):
    texts = ["don't don\u2019t", "u\u0308ber \u00fcber", "\u0441at cat", "ﬁne", "a\u00a0b\u200bc", "\u0007"]
    report = inspected(capsys, write(tmp_path, texts))
    found = {each["character"]: each for each in report["characters"]}
    counts = [each["count"] for each in report["characters"]]
    assert counts == sorted(counts)
    assert (found["t"]["count"], found["t"]["utterances"], found["t"]["key"]) == (4, 2, "u0")
    assert found["ﬁ"]["example"] == "ﬁne"
    notes = {character: each["note"] for character, each in found.items() if each["note"]}
    assert notes == {
        "\u2019": 'looks like "\'" U+0027, which is there, too',
        "\u0308": "normalisation (NFC) joins or replaces 1 of them",
        "\u0441": "looks like 'c' U+0063, which is there, too",
        "ﬁ": "a variant of 'fi', but a symbol of its own",
        "\u00a0": "white space: becomes a space",
        "\u200b": "invisible",
        "\u0007": "control character: no setting can name it, so remove it from the transcripts",
    }
    assert report["not_nfc"] == 1


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_a_corpus_of_several_blocks_is_counted_as_one(block, tmp_path, capsys, monkeypatch):
    texts = [f"wort {'ü' * (n % 3)}" for n in range(7)]
    manifest = write(tmp_path, texts)
    monkeypatch.setattr(inspection, "_BLOCK", block)
    report = inspected(capsys, manifest)
    assert [(e["utterances"], e["key"]) for e in report["left_out"]["characters"]] == [(4, "u1")]
    assert (report["words"]["running"], report["words"]["distinct"]) == (11, 3) and report["characters"][0][
        "key"
    ] == "u1"
    assert report["equal_texts"] == {
        "texts": 3,
        "utterances": 7,
        "most_frequent": [["wort", 3], ["wort ü", 2], ["wort üü", 2]],
    }


# ---- audio and numbers ----------------------------------------------------------------------------------------------


def test_doubtful_audio_is_named(tmp_path, capsys):
    noise = tiny_speech.noise(1.0)
    clipped = np.where(np.arange(len(noise)) % 10, noise, 32767).astype(np.int16)
    audio = {f"n{n}": tiny_speech.noise(1.0, seed=n) for n in range(5)}
    audio |= {"loud": clipped, "silent": np.zeros(16_000, np.int16), "again": audio["n1"]}
    entries = []
    for name, waveform in audio.items():
        (tmp_path / f"{name}.wav").write_bytes(tiny_speech.encode(waveform, format="WAV"))
        entries.append({"audio_filepath": f"{name}.wav", "text": "ten letters"})
    entries[3]["text"] = "x" * 100
    entries[4]["text"] = "x"
    report = inspected(capsys, tiny_speech.manifest(tmp_path / "m.jsonl", entries))
    assert [each["key"] for each in report["clipped"]["examples"]] == ["loud"]
    assert report["clipped"]["examples"][0]["value"] == pytest.approx(0.1)
    assert report["full_scale"] == pytest.approx(0.1 / 8)
    assert [(each["key"], each["value"]) for each in report["quiet"]["examples"]] == [("silent", pytest.approx(-120))]
    assert report["equal_audio"] == [["n1", "again"]]
    assert [each["key"] for each in report["too_fast"]["examples"]] == ["n3"]
    assert [each["key"] for each in report["too_slow"]["examples"]] == ["n4"]


def test_full_scale_and_level_of_a_waveform():
    seconds, level, full_scale, digest = inspection.measure(np.array([32767, -32768, 0, 0], np.int16))
    assert (seconds, full_scale) == (4 / 16_000, 0.5) and level == pytest.approx(-3.01, abs=0.01)
    assert digest != inspection.measure(np.array([32767, -32768, 0, 1], np.int16))[3]


def test_unusable_utterances_are_counted_by_reason(tmp_path, capsys):
    manifest = write(tmp_path, ["a b", "c"])
    good = manifest.read_text()
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    lines = [{"audio_filepath": "u0.flac"}, {"audio_filepath": "u1.flac", "text": " "}]
    lines += [{"audio_filepath": "none.wav", "text": "x"}, {"audio_filepath": "broken.wav", "text": "x"}]
    manifest.write_text(good + "".join(json.dumps(line) + "\n" for line in lines) + "no json\n" + good.splitlines()[0])
    report = inspected(capsys, manifest)
    assert (report["utterances"], report["usable"], report["decoded"]) == (8, 2, 5)
    found = {(each["reason"], each["only_in_sample"]): each["utterances"] for each in report["unusable"]}
    assert found == {
        ("missing transcript", False): 1,
        ("empty transcript", False): 1,
        ("missing audio", True): 1,
        ("undecodable or truncated audio", True): 1,
        ("unusable entry", False): 1,
        ("duplicate key", False): 1,
    }


def test_shards_and_their_source_are_reported_alike(tmp_path, capsys):
    source = tiny_speech.librispeech(tmp_path / "split", speakers=2, utterances=3)
    (source / "100" / "7" / "100-7-0002.flac").write_bytes(b"broken")
    shards = tiny_speech.shard(source, tmp_path / "shards")
    capsys.readouterr()
    of_source, of_shards = inspected(capsys, source, "--all"), inspected(capsys, shards, "--all")
    assert of_source["seconds_are"] == of_shards["seconds_are"] == "measured"
    dropped = {"reason": "undecodable or truncated audio", "utterances": 1, "only_in_sample": False}
    assert of_shards["unusable"] == [{**dropped, "example": f"see {shards}/dropped.jsonl"}]
    for name in ("unusable", "utterances", "decoded"):
        of_source.pop(name), of_shards.pop(name)
    assert of_source == of_shards
    assert of_shards["hours"] == pytest.approx(read_index([shards]).hours)
    assert of_shards["speakers"]["number"] == 2 and of_shards["speakers"]["largest"]["speaker"] == "101"
    both = inspected(capsys, shards, source)
    assert (both["usable"], both["unusable"][0]["reason"]) == (5, "duplicate key")


def test_a_sample_is_drawn_by_key_and_lengths_are_estimated_from_it(tmp_path, capsys):
    manifest = write(tmp_path, ["a word"] * 40, seconds=0.25)
    report = inspected(capsys, manifest, "--sample", 10)
    assert 2 <= report["decoded"] <= 20 and report["seconds_are"] == "estimated"
    assert report["hours"] == pytest.approx(40 * 0.25 / 3600)
    assert inspected(capsys, manifest, "--sample", 10) == report
    few = inspected(capsys, manifest, "--max-utterances", 3)
    assert (few["utterances"], few["seconds_are"]) == (3, "measured")
    entries = [json.loads(line) | {"duration": 0.25} for line in manifest.read_text().splitlines()]
    stated = inspected(capsys, tiny_speech.manifest(tmp_path / "stated.jsonl", entries), "--sample", 10)
    assert stated["seconds_are"] == "stated" and stated["hours"] == pytest.approx(40 * 0.25 / 3600)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([], []),
        ([0.3] * 3, [(0.0, 0), (0.05, 0), (0.1, 0), (0.15, 0), (0.2, 0), (0.25, 0), (0.3, 3)]),
        ([1.0] * 999 + [3000.0], [*((n / 10, 0) for n in range(10)), (1.0, 999), (1.1, 1)]),
    ],
)
def test_a_histogram_has_round_bins_and_no_long_tail(seconds, expected):
    assert inspection.histogram(np.array(seconds)) == expected


def test_audio_without_transcripts_has_numbers_but_no_vocabulary(tmp_path, capsys):
    write(tmp_path, ["x", "y"])
    report = inspected(capsys, tmp_path, "--no-text")
    assert (report["usable"], report["proposed"], report["words"]["running"]) == (2, [], 0)
    assert cli.main(["inspect", str(tmp_path), "--no-text"]) == 0
    assert "Text" not in capsys.readouterr().out


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_person_reads_it_and_gets_a_picture(tmp_path, capsys):
    manifest = write(tmp_path, ["Hallo Welt", "Über dem Wort", "Hallo Welt"], seconds=0.5, speaker="anna")
    assert cli.main(["inspect", str(manifest), "--plot", str(tmp_path / "lengths.png")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 utterances, 3 of them usable, 0.00 h (measured)\nlengths: min 0.50 s, median 0.50 s, ")
    assert "speakers: 1, largest anna (0.00 h), " in said
    assert "equal texts: 2 utterances have that of another one, 1 texts in all\n          2 x Hallo Welt" in said
    assert "\n          1           1  'Ü' U+00DC  u1: Über dem Wort\n" in said
    assert "  leaves out 1 of 3 utterances, 0.00 of 0.00 h\n           1 (0.00 h) for 'ü' U+00FC, such as u1\n" in said
    assert 'vocabulary:\n  kind: "characters"\n  symbols: " abdehlmortwü"\n  lowercase: true\n  drop: ""\n' in said
    assert said.endswith("  leaves out nothing: all 3 transcripts can be written\n")
    assert matplotlib.image.imread(tmp_path / "lengths.png").shape[:2] == (540, 960)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.jsonl"], "no such source: none.jsonl is neither a file nor a directory"),
        (["MANIFEST"], "corpus.jsonl: no utterance can be used: 1 x missing audio"),
        (["MANIFEST", "--plot", "none/a.png"], "none/a.png cannot be written"),
        (["MANIFEST", "--vocabulary.symbol=a"], "unknown setting 'vocabulary.symbol'"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, expected, tmp_path):
    manifest = tiny_speech.manifest(tmp_path / "corpus.jsonl", [{"audio_filepath": "none.wav", "text": "a"}])
    with pytest.raises(UserError, match=expected) as error:
        cli.main(["inspect", *(str(manifest) if each == "MANIFEST" else each for each in arguments)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["--sample=0", "--max-utterances=-1", "--workers=0"])
def test_a_number_below_one_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "mine.jsonl", option])
    assert "must be 1 or more" in capsys.readouterr().err
