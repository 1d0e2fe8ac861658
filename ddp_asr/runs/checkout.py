"""Which commit of the source code trains: `git_checkout()` for environment.json."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent


def git_checkout(folder: Path = PACKAGE) -> dict[str, Any]:
    """The commit of the checkout that holds `folder`, and whether files of it were changed since.

    Both are None where there is no git, and where git does not track the folder, as for an installed package that
    happens to lie inside somebody's repository.
    """
    try:
        tracked = _git(folder, "ls-files", ".")
        commit = _git(folder, "rev-parse", "HEAD") if tracked else None
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no")) if tracked else None
    except (OSError, subprocess.SubprocessError):
        commit = dirty = None
    return {"git_commit": commit, "git_dirty": dirty}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
