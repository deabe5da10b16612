"""Many events at once: what EngineState.apply does one by one, several times as quickly.

Most events are of steps that are alike: the same requests in the same order, one token each.

    step_begun  ((a, 7, 1, True), (b, 3, 1, True))  |  step_ended  |  tokens  ((a, 11, " the"), (b, 12, " a"))
    step_begun  ((a, 8, 1, True), (b, 4, 1, True))  |  step_ended  |  tokens  ((a, 13, " fox"), (b, 14, " hen"))

Of such a run of steps the first and the last are looked at: a request that got on by as many tokens as there were
steps, each of them with as many tokens as rows, was in all of them. Tokens are looked at by columns (event_rows.py),
and each request is visited once a run: a += [11, 13], b += [12, 14].

What blocks do changes nothing of what steps and tokens do, nor the other way round; so a run goes on over them. Fresh
blocks have no owner but the one they were allocated for, and of what the prefix cache does with a block only the last
matters. What is told of a request of the run ends it. All that is in no run goes the long way.
"""

from collections.abc import Callable, Sequence
from itertools import groupby, repeat
from operator import add, itemgetter, lt
from typing import TYPE_CHECKING

from tinyvllm.engine.event_rows import columns_of
from tinyvllm.engine.events import KINDS, Event
from tinyvllm.engine.state_records import StepState

if TYPE_CHECKING:
    from tinyvllm.engine.state import EngineState

PIECE = 64  # events of blocks that are applied in one go
SHORTEST = 4  # steps of a run, and events of tokens that are turned on their side: with fewer the long way is shorter

_BESIDE = frozenset(("blocks_shared", "blocks_freed", "step_profiled"))
_USUAL = frozenset(KINDS) - {"engine_config", "policy_changed"}

_seq, _kind = itemgetter(0), itemgetter(2)


def are_usual(state: "EngineState", events: Sequence[Event]) -> bool:
    """Whether nothing among these events calls for the long way: a gap, something told again, no KV cache."""
    first = events[0][0]
    return (not state._pass_over and first == (state.next_seq or first) and state.config.get("use_kv_cache", True)
            and _USUAL.issuperset(map(_kind, events)) and [*map(_seq, events)] == [*range(first, first + len(events))])


def apply_usual(state: "EngineState", events: Sequence[Event], handlers: dict[str, Callable],
                breathe: Callable[[], None]) -> None:
    """Apply events for which `are_usual` holds. breathe: called now and then, so that others get the interpreter."""
    steps: list[Event] = []  # step_begun, step_ended
    tokens: list[Event] = []
    blocks: list[Event] = []  # blocks_allocated
    findable: dict[int, bool] = {}  # what became of a block in the prefix cache at last
    for i, event in enumerate(events, 1):
        if not i % 24:
            breathe()
        kind = event[2]
        if kind == "block_cached" and isinstance(event[5], int):
            findable[event[5]] = True
        elif kind == "blocks_evicted":
            findable.update(dict.fromkeys(event[5], False))
        elif kind == "blocks_allocated":
            blocks.append(event)
        elif kind == "tokens":
            tokens.append(event)
        elif kind == "step_begun" or kind == "step_ended":
            steps.append(event)
        else:
            _apply_blocks(state, blocks, breathe)
            blocks = []
            if kind not in _BESIDE:
                _apply_steps(state, steps, breathe)
                _apply_tokens(state, tokens, breathe)
                steps, tokens = [], []
                if kind == "block_cached":  # many, told again
                    _apply_findable(state, findable)
                    findable = {}
            handlers[kind](state, event)
    _apply_blocks(state, blocks, breathe)
    _apply_findable(state, findable)
    _apply_steps(state, steps, breathe)
    _apply_tokens(state, tokens, breathe)
    state.next_seq = events[-1][0] + 1


def _apply_findable(state: "EngineState", findable: dict[int, bool]) -> None:
    """Events block_cached and blocks_evicted, of each block the last one."""
    state.cached_blocks.update({block_id: None for block_id, is_so in findable.items() if is_so})
    state.cached_blocks.discard_all(block_id for block_id, is_so in findable.items() if not is_so)


def _apply_blocks(state: "EngineState", events: list[Event], breathe: Callable[[], None]) -> None:
    """Events blocks_allocated, while none are freed or shared: of blocks that nobody holds."""
    for first in range(0, len(events), PIECE):
        breathe()
        owners: dict[int, list[str]] = {}
        places: dict[int, tuple[str, int]] = {}
        for event in events[first:first + PIECE]:
            name, ids = event[4], event[5]
            if any(block_id in owners or block_id in state.block_owners for block_id in ids):  # as no engine tells it
                state.block_owners.update(owners)
                state.block_places.update(places)
                owners, places = {}, {}
                state._blocks_allocated(event)
                continue
            request = state.requests.get(name)
            held = [] if request is None else request.block_ids
            for index, block_id in enumerate(ids, start=len(held)):
                owners[block_id], places[block_id] = [name], (name, index)
            held += ids
        state.block_owners.update(owners)
        state.block_places.update(places)


def _apply_steps(state: "EngineState", events: list[Event], breathe: Callable[[], None]) -> None:
    """Events step_begun and step_ended, while no request changes its status."""
    run: list[Event] = []
    size = 0  # rows of each step of the run
    for event in events:
        if event[2] == "step_begun":
            rows = len(event[6])
            if rows != event[5] or rows != size:  # more tokens than rows: some prompt's
                _apply_run(state, run, breathe)
                run, size = [], rows if rows == event[5] else 0
            if not size:
                breathe()
                state._step_begun(event)
                continue
        elif not size:
            state._step_ended(event)
            continue
        run.append(event)
    _apply_run(state, run, breathe)


def _apply_run(state: "EngineState", events: list[Event], breathe: Callable[[], None]) -> None:
    """The same of steps with as many rows each, one token a row; the first of them has begun here."""
    begun = [event for event in events if event[2] == "step_begun"]
    if len(begun) < SHORTEST or not _are_of_the_same(state, begun):
        for event in events:
            breathe()
            (state._step_begun if event[2] == "step_begun" else state._step_ended)(event)
        return
    breathe()
    requests = [request for row in begun[0][6] if (request := state.requests.get(row[0])) is not None]
    for request in requests:
        last = request.spans[-1]
        if last.kind != "decode" or last.end_ns is not None:
            state._open_span(request, "decode", begun[0][1])
    steps, step, ended = state.steps, None, None
    for _, t_ns, kind, number, _, a, b in events:
        if kind == "step_begun":
            step = StepState(number, t_ns, a, b)
            steps.append(step)
        else:
            step.end_ns, step.runner_ns, ended = t_ns, a, step
    for name, start, _, _ in ended.batch if ended else ():
        request = state.requests.get(name)
        if request is not None and request.status == "running":
            request.num_computed_tokens = start + 1


def _are_of_the_same(state: "EngineState", begun: list[Event]) -> bool:
    """Whether the first and the last are steps of the same requests, with nothing else in between; and no prompt's."""
    names, starts, counts, _ = columns_of(begun[0][6])
    last_names, last_starts, last_counts, _ = columns_of(begun[-1][6])
    known = map(state.requests.get, names)
    return (names == last_names and counts == last_counts == (1,) * len(names) and len({*names}) == len(names)
            and last_starts == (*map(add, starts, repeat(len(begun) - 1)),)
            and not any(map(lt, starts, [0 if request is None else request.num_prompt_tokens for request in known])))


def _apply_tokens(state: "EngineState", events: list[Event], breathe: Callable[[], None]) -> None:
    """Events "tokens", while no request comes or goes."""
    columns: list[tuple] = []
    if len(events) < SHORTEST:
        columns = [((),)] * len(events)
    for event in events[len(columns):]:
        if not len(columns) % 8:
            breathe()
        columns.append(columns_of(event[5]) if event[6] is None and event[5] else ((),))
    for names, run in groupby(zip(columns, events), lambda pair: pair[0][0]):
        run = [*run]
        if len(run) < SHORTEST or not names or len({*names}) < len(names):  # a name twice: its tokens change places
            for _, event in run:
                breathe()
                state._tokens(event)
            continue
        times = [event[1] for _, event in run]
        tokens, texts = zip(*(column[1] for column, _ in run)), zip(*(column[2] for column, _ in run))
        for i, (request, new_ids, new_texts) in enumerate(zip(map(state.requests.get, names), tokens, texts)):
            if not i % 16:
                breathe()
            if request is not None:
                request.token_ids += new_ids
                request.token_ns += times
                if text := "".join(new_texts):
                    request.text += text
