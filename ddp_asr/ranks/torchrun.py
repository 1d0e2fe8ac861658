"""torchrun with a sentence instead of a traceback: `python -m ddp_asr.ranks.torchrun --nproc-per-node=2 -m MODULE`.

torchrun's own options and effects. It raises an exception when a rank fails, although the rank has said why, and when a
signal stops it, although its ranks have written their checkpoint; then 30 lines of traceback hide what matters.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def run(argv: Sequence[str] | None = None) -> tuple[int, str]:
    """Runs torchrun; returns an exit status and the sentence that belongs to it.

    128 + N if signal N has stopped it; the status of the rank that failed first, 1 if a signal ended it; 1 if the
    nodes did not meet; 0 and no sentence otherwise.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.main(argv)
        return 0, ""
    except SignalException as stop:
        return 128 + stop.sigval, f"torchrun was stopped by {stop.sigval.name}"
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return code if 0 < code < 128 else 1, f"torchrun: rank {rank} {how}, before all others"
    except RendezvousError as error:
        what = "the nodes did not meet, or the first one has ended"
        return 1, f"error: {what} ({type(error).__name__}: {error})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun; 128 + N when signal N has stopped it, 1 when a rank has failed or the nodes have not met."""
    status, sentence = run(argv)
    if sentence:
        print(sentence, file=sys.stderr, flush=True)
    return status if status > 128 else min(status, 1)


if __name__ == "__main__":
    raise SystemExit(main())
