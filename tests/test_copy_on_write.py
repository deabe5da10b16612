"""Copies that share what has not changed: each is what a dict of its own would be."""

import random
import sys

import pytest

from tinyvllm.engine.copy_on_write import PAGE, CopyOnWriteDict


@pytest.mark.parametrize("seed", range(20))
def test_every_copy_is_as_a_dict_of_its_own_would_be(seed):
    draw = random.Random(seed)
    pairs = [(CopyOnWriteDict(), {})]
    for number in range(600):
        ours, plain = pairs[draw.randrange(len(pairs))]
        what, key = draw.randrange(10), draw.randrange(5 * PAGE)
        if what == 0 and len(pairs) < 12:
            pairs.append((ours.copy(), plain.copy()))
        elif what < 6:
            ours[key] = plain[key] = number
        elif what == 6:
            keys = [draw.randrange(5 * PAGE) for _ in range(40)]
            items = dict.fromkeys(keys, number) if number % 2 else [(key, number) for key in keys]
            ours.update(items)
            plain.update(items)
        elif what == 7:
            keys = [draw.randrange(5 * PAGE) for _ in range(20)]
            ours.discard_all(keys)
            for key in keys:
                plain.pop(key, None)
        else:
            assert ours.pop(key, "absent") == plain.pop(key, "absent")
        assert (key in ours) == (key in plain) and ours.get(key, "absent") == plain.get(key, "absent")
        for ours, plain in pairs:
            assert len(ours) == len(plain)
    for ours, plain in pairs:
        for number in range(6):
            assert ours.page(number) == {key: plain[key] for key in plain if key // PAGE == number}
        assert dict(ours) == plain and sorted(ours) == sorted(plain) and ours == plain and bool(ours) == bool(plain)
    assert len(pairs) == 12


def test_what_is_not_there():
    empty = CopyOnWriteDict()
    with pytest.raises(KeyError, match="70"):
        empty[70]
    with pytest.raises(KeyError, match="70"):
        del empty[70]
    assert 70 not in empty and empty.get(70) is None and not empty and repr(empty) == "CopyOnWriteDict({})"


def test_a_copy_of_a_large_one_takes_memory_for_what_changed():
    large = CopyOnWriteDict(dict.fromkeys(range(1000 * PAGE)))
    copy = large.copy()
    copy[3 * PAGE] = copy[3 * PAGE + 1] = 1
    own = [number for number, page in copy._pages.items() if page is not large._pages[number]]
    assert own == [3] and sys.getsizeof(copy._pages) < 100 * 1000
    large[3 * PAGE] = 2
    assert copy[3 * PAGE] == 1 and large[3 * PAGE + 1] is None
