"""Refusing unknown options by name, for every class that a user configures with keyword arguments."""

import difflib
import functools
import inspect


def refuse_unknown_options(error: type[Exception], reasons: dict[str, str] | None = None):
    """Class decorator: a keyword that `__init__` does not know raises `error`, names it and lists what is known.

    reasons: known names that are deliberately not supported -> why, in the user's words. Accepting an option and
    ignoring it is the worst answer an engine can give, so there is no **kwargs to swallow one.
    """

    def decorate(cls):
        original = cls.__init__
        known = [name for name in inspect.signature(original).parameters if name != "self"]

        @functools.wraps(original)
        def __init__(self, *args, **kwargs):
            for name in kwargs:
                if name in known:
                    continue
                if reasons and name in reasons:
                    raise error(f"{cls.__name__} does not support {name!r}: {reasons[name]}")
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise error(f"{cls.__name__} has no option {name!r}{hint} (options: {', '.join(known)})")
            original(self, *args, **kwargs)

        cls.__init__ = __init__
        return cls

    return decorate
