"""Topics: what panels subscribe to, by name. Pure Python over the engine's events; no Jupyter needed to test them.

Each file beside this one registers the topics that it holds.
"""

import importlib
import pkgutil

from widgets.topics.base import TOPICS, Topic, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["TOPICS", "Topic", "register"]
