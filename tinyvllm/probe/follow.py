"""Following requests: a watch that binds itself to the next request, at its very first token.

Whoever watches a request by name must know the name before the request runs, and a small model is done with a prompt
before a page has heard of it. FollowingWatch chooses in the engine's own thread, as a step begins:

    request 0   . . o o o o o o                  it stays with one request until that has ended,
    request 1         . . . . . . . .            does not change over in the middle of it,
    request 2                     o o o o o      and takes the next that begins
"""

from typing import TYPE_CHECKING

from tinyvllm.engine.scheduler import ScheduledRequest, SchedulerOutput
from tinyvllm.model.llama import Watch
from tinyvllm.probe.errors import ProbeError
from tinyvllm.runner.watch import RequestWatch

if TYPE_CHECKING:
    from tinyvllm.llm import LLM


class FollowingWatch(RequestWatch):
    """A RequestWatch that `follow` has made.

    moves_on: when its request has ended, or was None, take whichever begins next; else it is an ordinary watch.
    """

    def __init__(self, request_id: str | None, moves_on: bool, llm: "LLM", max_tokens: int):
        runner = llm.runner
        super().__init__(request_id, min(max_tokens, llm.memory_plan.max_model_len), runner.dims,
                         runner.config.hidden_size, runner.backend)
        self.moves_on = moves_on

    def enter(self, output: SchedulerOutput) -> Watch:
        """As RequestWatch.enter; the newest of several that begin in one step is taken."""
        if self.moves_on and (self.request_id is None or has_ended(self)):
            for scheduled in output.scheduled:
                if scheduled.request is not self.request and _begins(scheduled):
                    self.request_id = scheduled.request.request_id
        return super().enter(output)


def has_ended(watch: RequestWatch) -> bool:
    """Whether the watched request has been computed, and is over."""
    return watch.request is not None and watch.request.status.is_finished


def _begins(scheduled: ScheduledRequest) -> bool:
    """Whether a request is computed from its beginning on: for the first time, or again after a preemption."""
    return scheduled.start == max(0, scheduled.request.num_cached_tokens)


def follow(llm: "LLM", request_id: str | None = None, max_tokens: int = 1024) -> str | None:
    """See to it that something is watched; returns the id of the request that is, or None until one begins.

    request_id: watch this one; what is kept of it already stays. None: the newest running request, and when it has
    ended the next that begins. A watch that somebody else has set is left alone while its request runs or is to come.
    Only the thread that steps the engine may call this. Raises ProbeError, or OutOfDeviceMemoryError and then nothing
    is watched.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ProbeError(f"max_tokens is a whole number of 1 or more, got {max_tokens!r}")
    runner, running = llm.runner, llm.engine.scheduler.running
    watch = runner.watch
    if request_id is not None:
        keep = watch is not None and watch.request_id == request_id
        if keep and isinstance(watch, FollowingWatch):
            watch.moves_on = False
    elif isinstance(watch, FollowingWatch):
        watch.moves_on = True
        keep = not (has_ended(watch) and running)  # it was held on to, and others have begun meanwhile
        if watch.request is None and not llm.engine.has_request(watch.request_id):
            watch.request_id = None  # it was aborted before its first step
    else:
        keep = watch is not None and not (has_ended(watch) and running)
    if not keep:
        chosen = request_id if request_id is not None else running[-1].request_id if running else None
        runner.watch = watch = None  # its memory first
        runner.watch = watch = FollowingWatch(chosen, request_id is None, llm, max_tokens)
    return watch.request_id


def unfollow(llm: "LLM") -> None:
    """End a watch that `follow` has set, and no other."""
    if isinstance(llm.runner.watch, FollowingWatch):
        llm.probe.unwatch()
