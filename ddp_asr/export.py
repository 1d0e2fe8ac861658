"""A trained run as files for other programs: `python -m ddp_asr.export RUN --out DIR`

checkpoint --load as for evaluation--> recogniser --> DIR: model.onnx, model.json, transcribe.py, model.safetensors,
settings.yaml, README.md

DIR gets its name when all is written and the ONNX model has been compared with the one it was made from, so a command
that is killed leaves no DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import sync, sync_directory
from ddp_asr.ranks.environment import before_torch

EXAMPLES = """
examples:
  python -m ddp_asr.export runs/an4 --out an4-model
  python an4-model/transcribe.py hello.wav            numpy and onnxruntime are enough
  ddp-asr evaluate runs/an4 shards/an4-test --json > an4-test.json
  python -m ddp_asr.export runs/an4 --out an4-model --evaluation an4-test.json     its error rates in the model card
"""
PACKAGES = ("onnx", "onnxruntime", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything is written and the ONNX model gives what the run's model gives."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"ddp-asr export needs {' and '.join(missing)}: install with pip install {' '.join(missing)}")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} exists: name another directory, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"--out {out} cannot be made: {out.parent} is no directory; make it first")
    before_torch(os.environ)
    import torch

    from ddp_asr.recognition import exporting, model_card
    from ddp_asr.recognition.recogniser import build_recogniser, read_trained

    trained = read_trained(arguments.run)
    evaluations = [model_card.read_evaluation(path, trained) for path in arguments.evaluation]
    recogniser = build_recogniser(trained, torch.device("cpu"))
    try:
        with _new_directory(out) as aside:
            exporting.write_model(recogniser, aside)
            difference = exporting.largest_difference(recogniser, aside)
            if not difference <= exporting.TOLERANCE:
                raise UserError(
                    f"the ONNX model's log-probabilities differ by {difference:.2g} from the run's, and at most "
                    f"{exporting.TOLERANCE:g} is allowed, so nothing was exported: report this with your versions of "
                    "torch and onnxruntime"
                )
            card = model_card.make(trained, recogniser, evaluations, difference, name=out.resolve().name)
            (aside / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out} cannot be written: {reason}; free space or name another place") from None
    print(f"{trained.path} (step {trained.step}) as {out}:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:20} {path.stat().st_size / 1e6:8.2f} MB")
    print(f"onnxruntime and torch differ by at most {difference:.1e} in log-probabilities")
    if recogniser.config.decoder.kind != "greedy":
        print(f"the script decodes greedily, and not by the run's decoder of kind {recogniser.config.decoder.kind}")
    print(f"fill in licence and language in {out / 'README.md'} before you publish it")
    print(f"next: python {shlex.quote(str(out / 'transcribe.py'))} hello.wav")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.export",
        description="Exports a trained model: ONNX, a script that transcribes with it, safetensors, a model card.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory: its best.pt, else its newest checkpoint; or a checkpoint")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to make; it must not exist")
    add(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="what ddp-asr evaluate --json printed of this checkpoint, for the model card; may be given several times",
    )
    return parser


@contextlib.contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """A directory that gets its name `out` when the block ends well; it is removed after an error."""
    aside = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        yield aside
        for path in aside.iterdir():
            with path.open("rb+") as file:
                sync(file)
        os.replace(aside, out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
