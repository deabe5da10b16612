"""Refusing unknown options by name, for every class that a user configures with keyword arguments."""

import difflib
import functools
import inspect
from typing import Any


def refuse_unknown_options(error: type[Exception], unsupported: dict[str, Any] | None = None):
    """Class decorator: a keyword that `__init__` does not know raises `error`, names it and lists what is known.

    unsupported: names that users may bring from elsewhere -> the value that asks for nothing. That value is let pass,
    any other is refused. Accepting an option and ignoring it is the worst answer an engine can give, so there is no
    **kwargs to swallow one.
    """
    unsupported = unsupported or {}

    def decorate(cls):
        original = cls.__init__
        known = [name for name in inspect.signature(original).parameters if name != "self"]

        @functools.wraps(original)
        def __init__(self, *args, **kwargs):
            for name in list(kwargs):
                if name in known:
                    continue
                if name in unsupported:
                    value = kwargs.pop(name)
                    if isinstance(value, (int, float, list, type(None))) and value == unsupported[name]:
                        continue
                    raise error(f"{cls.__name__} does not support {name!r} (given: {value!r}): leave it out")
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise error(f"{cls.__name__} has no option {name!r}{hint} (options: {', '.join(known)})")
            original(self, *args, **kwargs)

        cls.__init__ = __init__
        return cls

    return decorate
