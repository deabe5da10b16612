"""Answers: what a panel can ask, by name. answer(feed, **args) gives a dictionary, a Payload, None, or a Future of one.

They run in the kernel's main thread, so they are quick, or they are Futures of `feed.look`, which runs between steps.
Each file beside this one registers the answers that it holds; `widgets.register.load_all` imports them.
"""

from widgets.answers.base import ANSWERS, answers

__all__ = ["ANSWERS", "answers"]
