"""A rank under the real torchrun: `-m tests.faults.rank LEDGER ATTEMPT ARGUMENTS OF ddp_asr.train`."""

import sys
from functools import partial
from pathlib import Path

from ddp_asr.errors import run_entry_point
from ddp_asr.train import main
from tests.faults.hooks import Hooks

if __name__ == "__main__":
    ledger, attempt, *arguments = sys.argv[1:]
    Hooks(Path(ledger), int(attempt))()
    raise SystemExit(run_entry_point(partial(main, arguments)))
