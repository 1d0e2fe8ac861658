"""Random numbers as a function of what they are for: (seed, epoch, utterance, purpose) and never of who asks, or when.

    uniform(seed=0, epoch=3, key_hash=index.key_hash, purpose="speed")           # (B, 1) numbers in [0, 1)

There is no state: an utterance gets the same masks, speed and noise whichever rank, thread or attempt reads it.
The mix is SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014), applied
once for each part of the address; vectorised, because a plan draws for 281,241 utterances at once.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def seed_of(*address: int | str) -> int:
    """A 63-bit seed for a generator that serves one purpose: `seed_of("order", seed, epoch)`."""
    text = "/".join(map(str, address)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def hashes(seed: int, epoch: int, key_hash: NDArray[np.uint64], purpose: str, count: int = 1) -> NDArray[np.uint64]:
    """(B, count) numbers of 64 bits for the B utterances of `key_hash`."""
    base = np.uint64(seed_of(purpose, seed, epoch))
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        utterance = _mix(np.asarray(key_hash, np.uint64) ^ _mix(np.asarray([base])))
        return _mix(utterance[:, None] + np.arange(count, dtype=np.uint64) * _GOLDEN)


def uniform(seed: int, epoch: int, key_hash: NDArray[np.uint64], purpose: str, count: int = 1) -> NDArray[np.float64]:
    """(B, count) numbers in [0, 1) for the B utterances of `key_hash`."""
    numbers = hashes(seed, epoch, key_hash, purpose, count)
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Draw:
    """The random numbers that one utterance gets in one epoch for one purpose."""

    purpose: str
    seed: int
    epoch: int
    key_hash: int

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) numbers in [0, 1), the same in every call."""
        return uniform(self.seed, self.epoch, np.array([self.key_hash], np.uint64), self.purpose, count)[0]

    def generator(self) -> np.random.Generator:
        """A generator for longer sequences, at its start in every call."""
        return np.random.default_rng(seed_of(self.purpose, self.seed, self.epoch, self.key_hash))
