"""A function applied to many items by several threads, its results in the order of the items.

Threads are enough: reading, decoding, resampling, encoding and checksums release Python's lock.
"""

import collections
import itertools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

WAITING_PER_WORKER = 8  # items handed out before the oldest result is waited for, which bounds memory


def in_order(
    function: Callable[..., Any], items: Iterable[Any], workers: int, *arguments: Any
) -> Generator[Any, None, None]:
    """(item, function(item, *arguments)) for each item. Close the generator to end the threads."""
    remaining, waiting = iter(items), collections.deque[Any]()
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            for item in itertools.islice(remaining, WAITING_PER_WORKER * workers - len(waiting)):
                waiting.append((item, pool.submit(function, item, *arguments)))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
