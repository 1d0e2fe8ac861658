"""What a user did wrong, in one sentence: the only exceptions that an entry point prints without a traceback.

Raise `UserError` with what was wrong, the value, what is allowed and what to do. An `OSError` at a path of the user's
is such a mistake, too, wherever it is raised (`users_error`). Anything else that escapes an entry point is a defect of
ours and keeps its traceback.
"""

import errno
import io
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

_LONGEST = 3_000  # characters of a sentence; what is longer quotes a value without end


class UserError(Exception):
    """A mistake or a broken input that the user can mend; its text is the whole message.

    A value that it quotes may be of any length and hold anything, so the middle of a long sentence is left out, a line
    feed becomes a space, and what else cannot be printed "?".
    """

    def __init__(self, sentence: str = "") -> None:
        if len(sentence) > _LONGEST:
            sentence = f"{sentence[: _LONGEST - 600]} ... {sentence[-500:]}"
        sentence = sentence.replace("\n", " ")
        super().__init__("".join(each if each.isprintable() or each == "\t" else "?" for each in sentence))


def counted(number: int, noun: str) -> str:
    """`number` with the noun in the singular or plural: "1 rank", "2 ranks", "1,000 processes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


_REMEDIES = {
    errno.ENOENT: "name a path that exists",
    errno.EACCES: "give yourself the permission, or name another path",
    errno.EPERM: "give yourself the permission, or name another path",
    errno.ENOSPC: "free space, or name a place with more of it",
    errno.EDQUOT: "free space, or name a place with more of it",
}
# What lies here is not the user's: that a file of it is missing is a defect of ours, or of the installation.
_INSTALLED = (Path(__file__).parent, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
_OURS = tuple(f"{os.path.realpath(path)}{os.sep}" for path in _INSTALLED)


def users_error(error: BaseException) -> UserError | None:
    """The UserError that says what is wrong where it is the user's: a UserError itself, or an OSError at their path.

    None for what may be a defect of ours. So is an OSError that names no path, or a path of this program. Python shows
    the traceback of an OSError at any path under `python -X dev`.
    """
    if isinstance(error, UserError):
        return error
    if not isinstance(error, OSError) or sys.flags.dev_mode:
        return None
    # Of two paths, as in a rename, the second is the one with the name that the user knows.
    path = error.filename if error.filename2 is None else error.filename2
    if not isinstance(path, str | bytes):
        return None
    name = os.fsdecode(path)
    if os.path.realpath(name).startswith(_OURS):
        return None
    remedy = _REMEDIES.get(error.errno or 0, "name another path")
    return UserError(f"{name}: {error.strerror or type(error).__name__}; {remedy}")


def run_entry_point(main: Callable[[], int]) -> int:
    """Returns `main`'s exit status; turns a mistake of the user's into one sentence on stderr and status 2.

    130 after Ctrl-C (the shell's convention), 141 where the reader of stdout has gone (`... | head`).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names and texts may have what the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would raise again: let it flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as error:
        mistake = users_error(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        return 2


def printable(text: str, most: int = 500) -> str:
    """A library's words about a broken file, which may quote it, as they can stand in a sentence of ours."""
    return "".join(character if character.isprintable() else "?" for character in text[:most])
