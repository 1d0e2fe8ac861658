"""What a user did wrong, in one sentence: the only exception that an entry point prints without a traceback.

Raise `UserError` with what was wrong, the value, what is allowed and what to do. Anything else that escapes an entry
point is a defect of ours and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake or a broken input that the user can mend; its text is the whole message."""


def run_entry_point(main: Callable[[], int]) -> int:
    """Returns `main`'s exit status; turns a `UserError` into one sentence on stderr and status 2.

    130 after Ctrl-C (the shell's convention), 141 where the reader of stdout has gone (`... | head`).
    """
    try:
        status = main()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would raise again: let it flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
