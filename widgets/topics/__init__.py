"""Topics: what panels subscribe to, by name. Pure Python over the engine's events; no Jupyter needed to test them.

Each file beside this one registers the topics that it holds; `widgets.register.load_all` imports them.
"""

from widgets.topics.base import TOPICS, Topic, register

__all__ = ["TOPICS", "Topic", "register"]
