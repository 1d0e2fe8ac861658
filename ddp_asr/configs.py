"""The settings and sbatch scripts that come with the package: `ddp-asr configs` lists them, or copies some.

ddp_asr/share (links to configs/ and slurm/ of the checkout, folders in a wheel)  ->  the same paths below --out
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.settings import nearest

SHARE = Path(__file__).parent / "share"

EXAMPLES = """
examples:
  ddp-asr configs                                         what there is, each with its first line
  ddp-asr configs configs/an4.yaml                        copies it to configs/an4.yaml
  ddp-asr configs configs/an4.yaml slurm/train.sbatch --out work
  ddp-asr configs --all
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ddp-asr configs",
        description="List the settings and sbatch scripts that come with ddp_asr, or copy some to edit them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="files to copy, as they are listed")
    parser.add_argument("--all", action="store_true", help="copy every file")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the copies (default: this one)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the files are listed or copied."""
    arguments = parse_arguments(argv)
    there = {str(path.relative_to(SHARE)): path for part in ("configs", "slurm") for path in _files(SHARE / part)}
    names = list(there) if arguments.all else arguments.names
    if arguments.all and arguments.names:
        raise UserError(f"--all copies every file: leave {arguments.names[0]!r} out, or --all")
    if not names and arguments.out != Path():
        raise UserError(f"--out {arguments.out} is for copies: name the files, or give --all")
    if not names:
        width, columns = max(map(len, there)), shutil.get_terminal_size((160, 24)).columns
        for name, path in there.items():
            meaning = textwrap.shorten(_first_comment(path), max(20, columns - width - 2), placeholder="...")
            print(f"{name:{width}}  {meaning}")
        return 0
    for name in names:
        if name not in there:
            raise UserError(f"{name!r} does not come with ddp_asr; {nearest(name, list(there))}")
    copies = {name: arguments.out / name for name in names}
    for name, copy in copies.items():  # looked at before the first is written
        if copy.exists() and copy.read_bytes() != there[name].read_bytes():
            raise UserError(f"{copy} exists and differs; move it away, or copy to another folder with --out")
    for name, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(there[name], copy)
        print(copy)
    return 0


def _files(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ")), "")


if __name__ == "__main__":
    sys.exit(run_entry_point(main))
