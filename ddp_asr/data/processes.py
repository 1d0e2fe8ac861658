"""A function applied to many items by several processes, its results in the order of the items."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ddp_asr.errors import UserError

WAITING_PER_WORKER = 8  # items handed out before the oldest result is waited for


def in_order(
    function: Callable[..., Any], items: Iterable[Any], workers: int, *arguments: Any
) -> Generator[Any, None, None]:
    """(item, function(item, *arguments)) for each item. Close the generator to end the processes."""
    if workers == 1:
        for item in items:
            yield item, function(item, *arguments)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    waiting: collections.deque[Any] = collections.deque()
    try:
        for item in items:
            # A process that starts here inherits the mask: Ctrl-C interrupts the parent alone, which ends the others.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                waiting.append((item, pool.submit(function, item, *arguments)))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if len(waiting) >= WAITING_PER_WORKER * workers:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out; run the same command again with fewer "
            "--workers: it continues where it ended"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Runs in each worker: idle workers hold both ends of their queue, so they do not notice that the parent died."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
