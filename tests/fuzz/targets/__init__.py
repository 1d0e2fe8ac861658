"""Every reader of the program, by name."""

import contextlib
import importlib

# Imported before the workers are forked: pyarrow and the writer would import them in each worker, which takes seconds.
import webdataset  # noqa: F401

from tests.fuzz.target import Target
from tests.fuzz.targets import models, runs, settings, shards, sources

with contextlib.suppress(ImportError):
    importlib.import_module("pandas")

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for module in (settings, sources, shards, models, runs)
    for target in vars(module).values()
    if isinstance(target, type) and issubclass(target, Target) and target.__module__ == module.__name__
}
