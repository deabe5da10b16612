"""What StepAnatomy asks: that the next step be taken apart, and how fast the machine could be."""

from concurrent.futures import Future
from typing import Any

from widgets.answers.base import answers


@answers("profile_next_step")
def profile_next_step(feed: Any) -> Future:
    """A Future of {"requests": how many wait for a step}; the profile comes as an event when the step has run.

    The machine's roofs are measured first, once (half a second), so that they stand in the event too: a recording can
    then be looked at on another machine.
    """
    return feed.look(_profile_next_step)


@answers("ceilings")
def ceilings(feed: Any) -> Future:
    """A Future of the roofs of the machine (bench.ceilings.Ceilings as a dictionary)."""
    return feed.look(lambda llm: llm.probe.ceilings()._asdict())


def _profile_next_step(llm: Any) -> dict[str, Any]:
    llm.probe.ceilings()
    llm.probe.profile_next_step()
    return {"requests": len(llm.engine.scheduler.running) + len(llm.engine.scheduler.waiting)}
