"""`evaluate --report` and `compare` as a user runs them: the page has evaluate's numbers, and its texts stay texts."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from ddp_asr import compare, evaluate, shard
from ddp_asr.data.audio import snr_db
from ddp_asr.errors import UserError
from ddp_asr.files import json_lines
from ddp_asr.recognition import report
from tests.tiny_recogniser import noises, tiny_state, write_checkpoint

SPEAKERS, UTTERANCES = 6, 18
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
HOSTILE = "</script><script>throw 1</script> <img src=x onerror=throw(2)> &lt; \u2028 \"'\\ <!--<script> עברית"


class Page(HTMLParser):
    """The tags of a page, and the texts in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data


def data_of(directory) -> dict:
    page = Page((directory / "index.html").read_text(encoding="utf-8"))
    assert len(page.scripts) == 2 and page.links == []
    return json.loads(page.scripts[0])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of noises by six speakers, and a run that writes something about them."""
    root = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(3)
    lines = []
    for number in range(UTTERANCES):
        soundfile.write(root / f"{number}.flac", noises(0.4 + 0.2 * number, seed=number), 16_000)
        text = " ".join("".join(random.choice(list("ab'"), size=3)) for _ in range(3))
        speaker = f"speaker {number % SPEAKERS}"
        lines.append({"audio_filepath": f"{number}.flac", "text": text, "id": f"u{number:02d}", "speaker": speaker})
    (root / "all.jsonl").write_text(json_lines(lines))
    assert shard.main([str(root / "all.jsonl"), "--out", str(root / "shards"), "--workers", "1"]) == 0
    for seed in (10, 11):
        state = tiny_state(seed=seed, data={"threads": 0, "test_max_seconds": 8.0})
        write_checkpoint(root / f"run-{seed}" / "best.pt", state)
        command = [str(root / f"run-{seed}"), str(root / "shards"), "--out", str(root / f"{seed}.jsonl"), "--worst=0"]
        assert evaluate.main(command) == 0
    return root


def hypotheses(path, texts, **fields):
    """A file as `evaluate --out` writes it: (reference, hypothesis) of each utterance."""
    lines = [{"key": f"k{n}", "reference": r, "hypothesis": h, **fields} for n, (r, h) in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_data_of_the_page_are_the_numbers_of_evaluate(corpus, tmp_path, capsys):
    capsys.readouterr()
    arguments = [str(corpus / "run-10"), str(corpus / "shards"), "--report", str(tmp_path / "new" / "page"), "--json"]
    assert evaluate.main([*arguments, "--out", str(tmp_path / "hyps.jsonl")]) == 0
    facts, data = json.loads(capsys.readouterr().out), data_of(tmp_path / "new" / "page")
    (system,) = data["systems"]
    for name in ("wer", "cer", "wer_interval", "cer_interval", "words", "word_deletions", "char_substitutions"):
        assert system[name] == facts[name]
    assert (facts["intervals_over"], facts["speakers"]) == ("speakers", SPEAKERS)
    assert data["units"] == {"kind": "speakers", "number": SPEAKERS}
    shown = dict(data["facts"])
    assert shown["checkpoint"] == facts["checkpoint"] and shown["step"] == "7 (epoch 2)"
    assert (shown["data"], shown["decoder"]) == (str(corpus / "shards"), "greedy")

    lines = [json.loads(line) for line in (tmp_path / "hyps.jsonl").read_text().splitlines()]
    for line, utterance in zip(lines, data["utterances"], strict=True):
        assert [utterance[name] for name in ("key", "speaker", "reference")] == [
            line[name] for name in ("key", "speaker", "reference")
        ]
        assert utterance["hypotheses"] == [line["hypothesis"]]
        assert utterance["seconds"] == round(line["seconds"], 2) and utterance["snr"] == round(line["snr_db"], 1)
        runs = re.findall(r"(\d+)([=sdi])", utterance["alignments"][0])
        count = {kind: sum(int(n) for n, k in runs if k == kind) for kind in "=sdi"}
        assert [count[k] for k in "sdi"] == [line[f"word_{e}s"] for e in ("substitution", "deletion", "insertion")]
        assert count["="] + count["s"] + count["d"] == line["words"] and utterance["errors"] == [
            sum(count.values()) - count["="]
        ]
        recording = tmp_path / "new" / "page" / utterance["audio"]
        assert recording.read_bytes() == (corpus / f"{int(line['key'][1:])}.flac").read_bytes()
    for groups in data["groups"].values():  # each utterance is in one of them, with its errors
        assert sorted(row for group in groups for row in group["rows"]) == list(range(UTTERANCES))
        assert sum(group["errors"][0] for group in groups) == sum(line["errors"][0] for line in data["utterances"])
        assert sum(group["words"] for group in groups) == facts["words"]
    assert data["groups"]["length"][0]["name"] == "under 1 s"
    for confusion in data["confusions"]:
        for row in confusion["rows"]:
            utterance = data["utterances"][row]
            assert confusion["reference"] in ["", *utterance["reference"].split()]
            assert confusion["hypothesis"] in ["", *utterance["hypotheses"][0].split()]


def test_recordings_are_copied_as_asked_and_old_ones_removed(corpus, tmp_path, monkeypatch, capsys):
    def audio(*options) -> list[str]:
        arguments = [str(corpus / "run-10"), str(corpus / "shards"), "--report", str(tmp_path), *options]
        assert evaluate.main(arguments) == 0
        assert f"\nreport  {tmp_path}/index.html\n" in capsys.readouterr().out
        paths = [u["audio"] for u in data_of(tmp_path)["utterances"] if u["audio"]]
        assert sorted(paths) == sorted(f"audio/{path.name}" for path in (tmp_path / "audio").iterdir())
        return paths

    assert len(audio()) == UTTERANCES
    first = max(data_of(tmp_path)["utterances"], key=lambda u: (u["errors"], u["char_errors"]))
    monkeypatch.setattr(report, "WORST_BYTES", (tmp_path / first["audio"]).stat().st_size)
    assert audio() == [first["audio"]]
    assert len(audio("--report-audio=all")) == UTTERANCES
    assert audio("--report-audio=none") == []
    theirs = tmp_path / "audio" / "1272-128104-0000.flac"  # a name of LibriSpeech's
    theirs.write_bytes(b"")
    evaluate.main([str(corpus / "run-10"), str(corpus / "shards"), "--report", str(tmp_path), "--report-audio=none"])
    assert theirs.exists()


def test_places_that_cannot_hold_a_report_are_named_before_the_evaluation(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<h1>mine</h1>")
    for name, said in {"file": r"--report .*/file cannot be written", "site": "index.html that is no report"}.items():
        with pytest.raises(UserError, match=said):
            evaluate.main(["nowhere.pt", str(corpus / "shards"), "--report", str(tmp_path / name)])
    assert (tmp_path / "site" / "index.html").read_text() == "<h1>mine</h1>"


def hostile_report(directory, hostile=HOSTILE):
    """A comparison of texts and names that try to be more than text."""
    texts = [(f"a {hostile} b", f"a {hostile} c {hostile}"), ("", "x"), ("x y", ""), ("", "")]
    a = hypotheses(directory / "a.jsonl", texts, speaker=hostile, seconds=1.5, snr_db=None)
    b = hypotheses(directory / "b<b>.jsonl", [(r, f"{r} {hostile}") for r, _ in texts])
    assert compare.main([a, b, "--report", str(directory / "page")]) == 0
    return directory / "page"


def test_no_transcript_can_become_markup(tmp_path):
    half = HOSTILE + " \ud800"  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
    page = hostile_report(tmp_path, half)
    data = data_of(page)  # two scripts, no link
    assert data["utterances"][0]["reference"] == " ".join(f"a {half} b".split())
    tags = Page((page / "index.html").read_text()).tags
    assert "img" not in tags and "b" not in tags
    script = Page((page / "index.html").read_text()).scripts[1]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org)", script
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_it_without_an_error(tmp_path):
    page = hostile_report(tmp_path)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/b",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", f"file://{page}/index.html"],
        capture_output=True,
        check=False,
        timeout=300,
    )
    shown = done.stdout.decode(errors="replace")
    assert b"CONSOLE" not in done.stderr, done.stderr.decode(errors="replace")
    assert shown.count("<article>") == 4 and "B is better" not in shown and "not significant" in shown
    assert re.search(r"<span[^>]*>&lt;/script&gt;&lt;script&gt;throw</span>", shown)


def test_compare_says_which_is_better_and_how_sure_it_is(corpus, tmp_path, capsys):
    a, b = str(corpus / "10.jsonl"), str(corpus / "11.jsonl")
    capsys.readouterr()
    assert compare.main([a, b, "--json", "--report", str(tmp_path), "--shards", str(corpus / "shards")]) == 0
    result, data = json.loads(capsys.readouterr().out), data_of(tmp_path)
    assert result["difference"] == pytest.approx(result["b"]["wer"] - result["a"]["wer"])
    assert (result["over"], result["units"]) == ("speakers", SPEAKERS)
    assert [s["wer"] for s in data["systems"]] == [result["a"]["wer"], result["b"]["wer"]]
    assert data["comparison"]["sentence"] == result["sentence"]
    assert all((tmp_path / u["audio"]).is_file() for u in data["utterances"])
    assert compare.main([b, a, "--json"]) == 0
    swapped = json.loads(capsys.readouterr().out)
    assert (swapped["difference"], swapped["p"]) == (-result["difference"], result["p"])
    assert compare.main([a, a]) == 0
    assert "The difference is not significant: p = 1.000 (matched-pairs test over 6 spea" in capsys.readouterr().out


def test_the_better_one_is_named(tmp_path, capsys):
    right = hypotheses(tmp_path / "right.jsonl", [("a b c", "a b c")] * 30)
    wrong = hypotheses(tmp_path / "wrong.jsonl", [("a b c", "a b x")] * 30)
    assert compare.main([right, wrong]) == 0
    assert "\nA is better than B: p < 0.001 (matched-pairs test over 30 utterances).\n" in capsys.readouterr().out
    assert compare.main([wrong, right]) == 0
    assert "\nB is better than A: p < 0.001" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_sentence(corpus, tmp_path):
    two = hypotheses(tmp_path / "two.jsonl", [("a", "a"), ("b", "b")])
    one = hypotheses(tmp_path / "one.jsonl", [("a", "a")])
    other = hypotheses(tmp_path / "other.jsonl", [("a", "a"), ("B", "b")])
    with pytest.raises(
        UserError, match=r"not of the same utterances, 1 only in .*two\.jsonl, such as k1: evaluate both"
    ):
        compare.main([two, one])
    with pytest.raises(UserError, match=r"references of 1 utterances differ, such as k1 with 'b' in .* and 'B' in"):
        compare.main([two, other])
    with pytest.raises(UserError, match=r"2 utterances are not in .*shards, such as k0: name the shards"):
        compare.main([two, two, "--report", str(tmp_path / "page"), "--shards", str(corpus / "shards")])
    with pytest.raises(UserError, match="there is no --report DIR"):
        compare.main([two, two, "--shards", str(corpus / "shards")])
    for text, said in {
        "": "has no line with a word",
        '{"key": "a", "reference": " ", "hypothesis": "b"}\n': "has no line with a word in its reference",
        "none\n": "line 1, has no key, reference and hypothesis: name a file that",
        '{"key": "a", "reference": "a", "hypothesis": 3}\n': "line 1, has no key",
        '{"key": "a", "reference": "a", "hypothesis": "b"}\n' * 2: "line 2, repeats the key a",
    }.items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(UserError, match=rf"bad\.jsonl.*{said}"):
            compare.main([one, str(tmp_path / "bad.jsonl")])
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read \(No such file or directory\): name a file"):
        compare.main([one, str(tmp_path / "none.jsonl")])


def test_the_estimate_of_noise_follows_the_noise():
    random = np.random.default_rng(0)
    talks = np.arange(64_000) // 8_000 % 2
    for snr in (10, 20, 30):
        waveform = random.normal(size=64_000) * 30 * (1 + talks * 10 ** (snr / 20))
        assert snr_db(waveform.round().astype(np.int16)) == pytest.approx(snr, abs=3)
    assert snr_db(np.zeros(5, np.int16)) == 0.0 and not math.isnan(snr_db(np.ones(1, np.int16)))
