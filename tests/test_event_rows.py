"""Rows that are kept as columns read as a tuple of rows."""

import json

import pytest

from tinyvllm.engine.event_rows import Rows, columns_of
from tinyvllm.engine.events import Event
from tinyvllm.engine.trace import Trace

PLAIN = (("a", 7, 1, True), ("b", 3, 2, False), ("c", 0, 5, True))
ROWS = Rows(*zip(*PLAIN))


def test_they_read_as_a_tuple_of_rows():
    assert len(ROWS) == 3 and (*ROWS,) == PLAIN and ROWS[1] == PLAIN[1] and ROWS[-1] == PLAIN[-1]
    assert ROWS[:2] == PLAIN[:2] and ROWS[1:1] == () and [*reversed(ROWS)] == [*reversed(PLAIN)]
    assert PLAIN[2] in ROWS and ROWS.index(PLAIN[1]) == 1 and repr(ROWS) == repr(PLAIN)
    assert not Rows((), ()) and (*Rows((), ()),) == () and Rows((), ())[:3] == ()
    with pytest.raises(IndexError):
        ROWS[3]


def test_they_are_equal_to_what_has_the_same_rows():
    assert ROWS == PLAIN and PLAIN == ROWS and ROWS == Rows(*zip(*PLAIN)) and ROWS == [*PLAIN]
    for other in (PLAIN[:2], (*PLAIN[:2], ("c", 0, 5, False)), "abc", None, (1, 2, 3)):
        assert ROWS != other and other != ROWS
    with pytest.raises(TypeError, match="unhashable"):
        hash(ROWS)


def test_columns_come_out_as_they_went_in():
    assert columns_of(ROWS) is ROWS.columns and columns_of(PLAIN) == ROWS.columns and columns_of(()) == ()


def test_a_file_has_them_as_rows(tmp_path):
    events = [Event(0, 0, "engine_config", 0, None, {"num_blocks": 9}, None),
              Event(1, 5, "step_begun", 1, None, 8, ROWS),
              Event(2, 9, "tokens", 1, None, Rows(("a", "c"), (65, 66), ("A", "")), None),
              Event(3, 9, "tokens", 1, None, (), None)]
    path = Trace(events, {}).save(tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[2][6] == [list(row) for row in PLAIN] and lines[3][5] == [["a", 65, "A"], ["c", 66, ""]]
    assert Trace.load(path).events == events
