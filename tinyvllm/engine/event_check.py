"""Whether an event from a file is one: what its fields are, kind by kind, as the table in events.py has it.

Whoever reads events relies on that without a look; so a file is looked at when it is loaded.
"""

from collections.abc import Callable
from typing import Any

from tinyvllm.engine.events import Event

_LARGEST = 2**53  # of whole numbers that a page can hold
_REASONS = ("stop", "length", "abort")


def check_event(event: Event) -> None:
    """Raise ValueError, saying what is wrong with it. A kind that is not known here is left to whoever knows it."""
    for name in ("seq", "t_ns", "step"):
        if type(getattr(event, name)) is not int:
            raise ValueError(f"its {name} must be a whole number, got {getattr(event, name)!r}")
    if not (abs(event.t_ns) < 2**63 and _is_count(event.seq) and 0 <= event.step < 2**32):
        raise ValueError(f"seq {event.seq}, t_ns {event.t_ns} and step {event.step} cannot all be right")
    fits = _FITS.get(event.kind)
    if fits is None:
        return
    is_of_nobody = event.request_id is None
    if not (event.kind in _OF_NOBODY if is_of_nobody else isinstance(event.request_id, str)):
        raise ValueError(f"{event.kind!r} cannot be of the request {event.request_id!r}")
    try:
        is_right = fits(event.a, event.b)
    except (TypeError, ValueError):  # something else where rows are
        is_right = False
    if not is_right:
        raise ValueError(f"{event.kind!r} cannot say {str(event.a)[:60]!r} and {str(event.b)[:60]!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and set(map(type, values)) <= {int} and (
        not values or 0 <= min(values) and max(values) < _LARGEST)


def _is_table(rows: Any, *columns: Callable[[Any], bool]) -> bool:
    """Whether each row has these columns."""
    return isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(columns) for row in rows) and all(
        fits(row[i]) for row in rows for i, fits in enumerate(columns))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_config(a: Any) -> bool:
    """Options by name; of the pool's numbers a picture is made at once."""
    return isinstance(a, dict) and all(_is_count(a.get(name, 1)) for name in (
        "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len")) and (
        _is_count(a.get("block_size", 1)) and a.get("block_size", 1) > 0)


def _are_tokens(a: Any, b: Any) -> bool:
    return _is_table(a, _is_text, _is_count, _is_text) and (
        b is None or isinstance(b, list) and set(map(type, b)) <= {int} and len(b) == len(a))


def _is_profile(a: Any, b: Any) -> bool:
    return (b is None or isinstance(b, dict)) and _is_table(a, _is_text, lambda layer: type(layer) is int, _is_number,
                                                            _is_number, _is_number)


_FITS: dict[str, Callable[[Any, Any], bool]] = {
    "engine_config": lambda a, b: _is_config(a) and (b is None or _is_count(b)),
    "policy_changed": lambda a, b: _is_config(a),
    "request_added": lambda a, b: (_is_count(a) or _are_counts(a)) and _is_count(b),
    "request_scheduled": lambda a, b: (_is_count(a) or _are_counts(a) and len(a) == 2) and _is_count(b),
    "request_preempted": lambda a, b: True,  # nobody makes anything of what it says
    "request_finished": lambda a, b: a in _REASONS,
    "step_begun": lambda a, b: _is_count(a) and _is_table(b, _is_text, _is_count, _is_count,
                                                          lambda sampled: sampled in (True, False)) and (
        a == sum(row[2] for row in b)),
    "step_ended": lambda a, b: _is_count(a),
    "step_failed": lambda a, b: _is_text(a),
    "blocks_allocated": lambda a, b: _are_counts(a), "blocks_shared": lambda a, b: _are_counts(a),
    "blocks_freed": lambda a, b: _are_counts(a), "blocks_evicted": lambda a, b: _are_counts(a),
    "block_cached": lambda a, b: _is_count(a) or _are_counts(a),
    "tokens": _are_tokens,
    "step_profiled": _is_profile,
}
_OF_NOBODY = ("engine_config", "policy_changed", "step_begun", "step_ended", "step_failed", "block_cached",
              "blocks_evicted", "tokens", "step_profiled")
