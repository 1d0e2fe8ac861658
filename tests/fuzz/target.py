"""What a target is: a reader of the product, and inputs for it.

    target.seeds()                       # valid inputs, the same bytes each time
    target.mutate(tree, random)          # one of them, broken
    target.read(directory)               # what the program's doors call; returns, or raises UserError

A case is a target, a seed of the random generator and a number: `arpa:0:1234`. The first cases are the valid inputs
themselves, which must be accepted.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from ddp_asr.errors import UserError
from tests.fuzz.mutate import Tree, mutate_file


class Refused(UserError):
    """A reader's refusal that is no exception in the product, such as an utterance that is dropped with its reason."""


class Wrong(Exception):
    """An accepted input that means something else than its checksum says, or a result that breaks its own rules."""


class Target:
    """A reader and its inputs."""

    name: str
    share: int
    """Cases of this target in a thousand of all."""
    mutated: tuple[str, ...] = ()
    """The files of the tree that are changed; () for all."""

    def __init__(self, scratch: Path) -> None:
        """`scratch`: a directory for files that stay the same over all cases."""
        self.scratch = scratch

    def seeds(self) -> list[Tree]:
        raise NotImplementedError

    def mutate(self, tree: Tree, random: Random) -> Tree:
        """Mostly one file of the tree is changed, sometimes two; sometimes one is missing."""
        names = [name for name in tree if not self.mutated or name in self.mutated]
        if random.random() < 0.02:
            return {name: content for name, content in tree.items() if name != random.choice(names)}
        for name in random.sample(names, min(len(names), random.choice((1, 1, 1, 2)))):
            tree = mutate_file(tree, name, random)
        return tree

    def read(self, directory: Path) -> None:
        raise NotImplementedError


def make_input(target: Target, seeds: list[Tree], seed: int, number: int) -> Tree:
    """The input of a case."""
    if number < len(seeds):
        return seeds[number]
    random = Random(f"{target.name} {seed} {number}")
    return target.mutate(random.choice(seeds), random)
