"""Checkpoints, language models, texts and tokenisers."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from ddp_asr import compare, config, lm
from ddp_asr.config import config_from_dict
from ddp_asr.data.index import read_index
from ddp_asr.decoding import Word, make_decoder
from ddp_asr.decoding.kneser_ney import estimate
from ddp_asr.decoding.ngram import read_arpa, write_arpa
from ddp_asr.features.log_mel import LogMel
from ddp_asr.files import json_lines
from ddp_asr.model import make_model
from ddp_asr.objective import Objective
from ddp_asr.ranks.world import World
from ddp_asr.recognition.recogniser import build_recogniser, read_trained
from ddp_asr.recognition.transcription import Transcript
from ddp_asr.recognition.transcripts import continued, render_json
from ddp_asr.runs import checkpoint
from ddp_asr.text import make_tokeniser, tokeniser_from_state
from ddp_asr.text.score import count_each
from ddp_asr.training.learner import Learner
from ddp_asr.training.optim import WeightAverage, make_optimizer
from ddp_asr.training.resume import make_progress, read_state, require_same_corpus
from tests.fuzz.mutate import VALUES, Tree, mutate_bytes, mutate_text, mutate_value
from tests.fuzz.target import Target, Wrong
from tests.fuzz.targets.shards import SETTINGS, make_shards
from tests.tiny_recogniser import tiny_state, write_checkpoint

CPU = torch.device("cpu")


class Checkpoint(Target):
    """Checkpoint files, damaged as a disk or a person with a zip tool damages them"""

    name = "checkpoint"
    share = 70

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.data = write_checkpoint(scratch / "valid.pt", tiny_state()).read_bytes()
        self.weights = read_trained(scratch / "valid.pt").weights

    def seeds(self) -> list[Tree]:
        return [{"run/best.pt": self.data}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        if random.random() < 0.5:
            return {"run/best.pt": mutate_bytes(self.data, random)}
        return {"run/best.pt": _other_members(self.data, random)}

    def read(self, directory: Path) -> None:
        path = directory / "run" / "best.pt"
        trained = read_trained(path)
        recogniser = build_recogniser(trained, CPU)
        recogniser.decoder(*recogniser.logits(torch.zeros(1, 4_000, dtype=torch.int16), torch.tensor([4_000])))
        with zipfile.ZipFile(path) as members, zipfile.ZipFile(io.BytesIO(self.data)) as valid:
            same_sums = {i.filename: i.CRC for i in members.infolist()} == {i.filename: i.CRC for i in valid.infolist()}
        if same_sums and not all(torch.equal(trained.weights[name], weight) for name, weight in self.weights.items()):
            raise Wrong("other weights than those that the checksums cover")


def _other_members(data: bytes, random: Random) -> bytes:
    """The zip with a member changed, left out or doubled, and right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as members, zipfile.ZipFile(file, "w") as changed:
        names = members.namelist()
        chosen = random.choice((names[0], random.choice(names)))  # the pickle comes first
        for name in names:
            content, change = members.read(name), random.randrange(8)
            if name == chosen and change == 0:
                continue
            if name == chosen and change == 1:
                changed.writestr(random.choice(("../x", "/tmp/x", f"{name}x", "archive/data.pkl")), content)
                continue
            changed.writestr(name, mutate_bytes(content, random) if name == chosen else content)
    return file.getvalue()


class State(Target):
    """Whole checkpoints with another state in them, as another version or a script writes them"""

    name = "state"
    share = 50

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.index = read_index([make_shards(scratch)])
        self.config = config_from_dict(SETTINGS, "the test")
        progress = {"step": 7, "best": (0.5, 1.25), "best_step": 7, "evaluated_step": 7, "trained_s": 1.5}
        more = {"progress": progress, "fingerprint": self.index.fingerprint()}
        self.state = {**tiny_state(**SETTINGS), **more, **self._learner().state()}

    def seeds(self) -> list[Tree]:
        file = io.BytesIO()
        torch.save(self.state, file)
        return [{"run/checkpoints/step-00000007.pt": file.getvalue()}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        file = io.BytesIO()
        torch.save(_other_state(self.state, random), file)
        return {"run/checkpoints/step-00000007.pt": file.getvalue()}

    def read(self, directory: Path) -> None:
        run = directory / "run"
        build_recogniser(read_trained(run), CPU)
        found = checkpoint.newest_good(run, on_damage=lambda *_: None)
        assert found is not None
        state = read_state(found.path, self.config)
        assert state is not None
        require_same_corpus(found.path, state, self.config, self.index)
        make_progress(found.path, state, run)
        self._learner().load(state)

    def _learner(self) -> Learner:
        model = make_model(self.config, make_tokeniser(self.config.vocabulary).size)
        return Learner(
            world=World(0, 1, 0, CPU),
            model=model,
            log_mel=LogMel(self.config.features),
            objective=Objective(self.config.objective, seed=0, frame_s=self.config.frame_s),
            optimizer=make_optimizer(model, self.config.optim),
            optim=self.config.optim,
            precision="fp32",
            average=WeightAverage(model.parameters(), 0.9),
        )


def _other_state(state: dict[str, Any], random: Random) -> Any:
    state = {name: value.copy() if isinstance(value, dict) else value for name, value in state.items()}
    change = random.randrange(8)
    name = random.choice(list(state))
    weight = random.choice(list(state["model"]))
    tensor = state["model"][weight]
    if change == 0:
        del state[name]
    elif change == 1:
        state[name] = random.choice((*VALUES, torch.zeros(2), (1, 2)))
    elif change <= 3:
        name = random.choice(("config", "tokeniser", "progress"))
        plain = json.loads(json.dumps(state[name]))
        state[name] = mutate_value(plain, random)
    elif change == 4:
        shapes = (
            tensor[:0],
            tensor[None],
            tensor.double(),
            tensor.to(torch.int64),
            tensor * float("nan"),
            tensor.flatten(),
        )
        state["model"][weight] = random.choice((*shapes, tensor.to_sparse(), None, 3, "x", torch.zeros(())))
    elif change == 5:
        _change_moment(state, random)
    elif change == 6:
        state["averages"] = {**state["averages"], weight: random.choice((None, tensor[:0], tensor[None], 3))}
    else:
        state["model"] = {**state["model"], random.choice(("x", weight.upper())): state["model"].pop(weight)}
        state["averages"] = random.choice((None, {}, {"x": tensor}, [], {weight: tensor[:0]}))
    try:
        pickle.dumps(state)
    except RecursionError:
        return {}
    return state


def _change_moment(state: dict[str, Any], random: Random) -> None:
    """One of the optimiser's numbers becomes something else, or is gone."""
    optimizer = copy.deepcopy(state["optimizer"])
    number = random.choice(list(optimizer["state"]))
    moments = optimizer["state"][number]
    name = random.choice(list(moments))
    others = (None, 3, "x", torch.zeros(2), torch.zeros((), dtype=torch.int64), moments[name].to_sparse())
    moments[name] = random.choice(others)
    removed = random.choice((moments, optimizer["state"], optimizer, {1: 1}))
    if random.random() < 0.3:
        removed.pop(random.choice(list(removed)))
    if random.random() < 0.2:
        optimizer["param_groups"] = random.choice(([], None, [{"params": [0]}], [{}, {}]))
    state["optimizer"] = optimizer


# ---- language models and texts -------------------------------------------------------------------------------------


def _arpa(order: int, directory: Path) -> bytes:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 9, 30)
    model, _ = estimate(random.integers(0, 3, lengths.sum()), lengths, ["a", "b", " "], order)
    write_arpa(model, directory / "lm.arpa")
    return (directory / "lm.arpa").read_bytes()


ARPA = b"""\\data\\
ngram 1=6
ngram 2=5
ngram 3=2

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.3
-1.2\t</s>
-0.6\ta\t-0.2
-0.7\tb\t-0.25
-0.8\t<space>\t-0.1

\\2-grams:
-0.3\t<s> a\t-0.1
-0.4\ta b
-0.5\tb </s>
-0.6\tb <space>\t-0.05
-0.7\t<space> a

\\3-grams:
-0.2\t<s> a b
-0.25\tb <space> a

\\end\\
"""


class Arpa(Target):
    """ARPA language models, plain and compressed"""

    name = "arpa"
    share = 130

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.tokeniser = make_tokeniser(config_from_dict({"vocabulary": {"symbols": "ab "}}, "the test").vocabulary)
        self.logits = torch.randn(2, 4, self.tokeniser.size, generator=torch.Generator().manual_seed(0))
        self.estimated = _arpa(4, scratch)

    def seeds(self) -> list[Tree]:
        texts = (ARPA, self.estimated, gzip.compress(ARPA, mtime=0))
        return [{"lm.arpa": text} for text in texts]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        text = tree["lm.arpa"]
        assert isinstance(text, bytes)
        if text[:2] == b"\x1f\x8b":
            changed = (
                mutate_bytes(text, random)
                if random.random() < 0.7
                else gzip.compress(mutate_text(ARPA, random), mtime=0)
            )
            return {"lm.arpa": changed}
        return {"lm.arpa": mutate_text(text, random)}

    def read(self, directory: Path) -> None:
        settings = config.Beam(size=4, lm=str(directory / "lm.arpa"), n_best=2)
        for hypothesis in make_decoder(settings, self.tokeniser, 0.025)(self.logits, torch.tensor([4, 3])):
            if math.isnan(hypothesis.score) or any(math.isnan(score) for _, score in hypothesis.others):
                raise Wrong("a hypothesis has a score that is no number")


class Lexicon(Target):
    """Lexicons, with a language model of their words"""

    name = "lexicon"
    share = 30
    mutated = ("words.txt", "words.arpa")

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.tokeniser = make_tokeniser(config_from_dict({"vocabulary": {"symbols": "ab "}}, "the test").vocabulary)
        self.logits = torch.randn(2, 6, self.tokeniser.size, generator=torch.Generator().manual_seed(0))

    def seeds(self) -> list[Tree]:
        words = ARPA.replace(b"<space>", b"ab")
        return [{"words.txt": text, "words.arpa": words} for text in (b"a\tabba\nb\tbaab\nab\tab\n", b"a\nb\n")]

    def read(self, directory: Path) -> None:
        settings = config.Lexicon(size=4, lm=str(directory / "words.arpa"), lexicon=str(directory / "words.txt"))
        for hypothesis in make_decoder(settings, self.tokeniser, 0.025)(self.logits, torch.tensor([6, 5])):
            if math.isnan(hypothesis.score):
                raise Wrong("a hypothesis has a score that is no number")


class Text(Target):
    """Texts that a language model is made of"""

    name = "text"
    share = 45

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.tokeniser = make_tokeniser(config_from_dict({}, "the test").vocabulary)

    def seeds(self) -> list[Tree]:
        text = b"THE FIRST SENTENCE\nit's the second one\n\nand the third\n" * 2
        return [{"lines.txt": text}, {"lines.txt": gzip.compress(text, mtime=0)}]

    def read(self, directory: Path) -> None:
        for unit in ("char", "word"):
            text = lm.read_text([str(directory / "lines.txt")], self.tokeniser, unit)
            model, _ = estimate(np.asarray(text.numbers), np.asarray(text.lengths), text.symbols, 3)
            write_arpa(model, directory / "lm.arpa")
            again = read_arpa(directory / "lm.arpa")
            if [len(order) for order in again.orders] != [len(order) for order in model.orders]:
                raise Wrong("the model that was written reads back as another one")


class Hypotheses(Target):
    """What `evaluate --out` wrote, for `compare`"""

    name = "hypotheses"
    share = 20

    def seeds(self) -> list[Tree]:
        line = {"speaker": "s", "seconds": 1.5, "snr_db": 20.5, "score": -1.0}
        texts = [("a b", "a b"), ("b a", "b"), ("", "a"), ("ß", "")]
        files = [
            json_lines({"key": f"k{n}", "reference": r, "hypothesis": h, **line} for n, (r, h) in enumerate(lines))
            for lines in (texts, [(r, r) for r, _ in texts])
        ]
        return [{name: text.encode() for name, text in zip(("a.jsonl", "b.jsonl"), files, strict=True)}]

    def read(self, directory: Path) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            compare.main(
                [*(str(directory / name) for name in ("a.jsonl", "b.jsonl")), "--report", str(directory / "r")]
            )
        page = (directory / "r" / "index.html").read_text(encoding="utf-8")
        if page.count("</script>") != 2 or ("better" not in out.getvalue() and "significant" not in out.getvalue()):
            raise Wrong("a text ends the page's data, or nothing is said")


class Transcripts(Target):
    """A file of transcripts, and its settings, that a second `transcribe --out` continues"""

    name = "transcripts"
    share = 20

    def seeds(self) -> list[Tree]:
        said = [Word("a", 0.1, 0.5, 0.9), Word("b", 0.6, 1.0, 0.5)]
        each = [Transcript("a.wav", 1.5, said, "a b"), Transcript("b/\u00df\udce9.wav", 0.0, [])]
        lines = "".join(map(render_json, each)).encode(errors="backslashreplace")
        return [{"said.jsonl": lines, "said.jsonl.settings.json": b'{"cut": "pauses"}'}]

    def read(self, directory: Path) -> None:
        path = directory / "said.jsonl"
        with continued(path, {"cut": "pauses"}) as (append, done):
            append(Transcript("c.wav", 2.0, []))
        with continued(path, {"cut": "pauses"}) as (_, again):
            if again != done | {"c.wav": ("", None)}:
                raise Wrong(f"{sorted(again)} is there after c.wav was added to {sorted(done)}")


class Tokeniser(Target):
    """Vocabularies, transcripts of any Unicode, and their error rates"""

    name = "tokeniser"
    share = 40
    mutated = ("state.json", "line.txt")

    def seeds(self) -> list[Tree]:
        state = {"kind": "characters", "symbols": "' abcdefghijklmnopqrstuvwxyz", "lowercase": True, "drop": ".,"}
        text = "It's ﬁne, Übung macht den Meister. \u0130stanbul e\u0301\n"
        pieces = make_tokeniser(config.Pieces(size=9, symbols=" ab'"), ["ab a bab", "ab ab aab", "bab a b'a"]).state()
        return [
            {"state.json": json.dumps(of_kind).encode(), "line.txt": line.encode()}
            for of_kind, line in ((state, text), (pieces, "ab bab\ta'b  a9\n"))
        ]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        tree = super().mutate(tree, random)
        if random.random() < 0.3:
            characters = [
                chr(random.choice((random.randrange(0xD800), random.randrange(0xE000, 0x110000)))) for _ in range(30)
            ]
            tree = {**tree, "line.txt": "".join(characters).encode()}
        return tree

    def read(self, directory: Path) -> None:
        try:
            state = json.loads((directory / "state.json").read_bytes())
            text = (directory / "line.txt").read_bytes().decode("utf-8", "surrogateescape")
        except (ValueError, RecursionError, FileNotFoundError):
            return  # no reader of ours
        tokeniser = tokeniser_from_state(state)
        written = tokeniser.decode(tokeniser.encode(text, skip_foreign=True))
        (counts, foreign, length) = (lambda c: (c, c.foreign[0], int(c.length[0])))(tokeniser.count([text]))
        if length != len(tokeniser.encode(text, skip_foreign=True)) or (
            not foreign and written != tokeniser.normalise(text)
        ):
            raise Wrong(f"counts {counts} are not those of {text!r}")
        if not (count_each([text], [text])[0, [0, 1, 2, 4, 5, 6]] == 0).all():
            raise Wrong(f"{text!r} has errors against itself")
