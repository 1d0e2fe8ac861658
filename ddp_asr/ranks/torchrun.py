"""torchrun with a sentence instead of a traceback: `python -m ddp_asr.ranks.torchrun --nproc-per-node=2 -m MODULE`.

torchrun's own options and effects. It raises an exception when a rank fails, although the rank has said why, and when a
signal stops it, although its ranks have written their checkpoint; then 30 lines of traceback hide what matters.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun; 128 + N when signal N has stopped it, 1 when a rank has failed or the nodes have not met."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.main(argv)
        return 0
    except SignalException as stop:
        print(f"torchrun was stopped by {stop.sigval.name}", file=sys.stderr, flush=True)
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"torchrun: rank {rank} {how}, before all others", file=sys.stderr, flush=True)
    except RendezvousError as error:
        what = "the nodes did not meet, or the first one has ended"
        print(f"error: {what} ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
