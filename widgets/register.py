"""Finds the topics and answers: every file in their two folders."""

import importlib
import pkgutil
from functools import lru_cache


@lru_cache
def load_all() -> None:
    """Import all of them, once. Called when the first Feed is made, since some of them import Feed."""
    for name in ("widgets.topics", "widgets.answers"):
        for found in pkgutil.iter_modules(importlib.import_module(name).__path__):
            importlib.import_module(f"{name}.{found.name}")
