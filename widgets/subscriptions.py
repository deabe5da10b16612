"""Who looks at what: topics, the views that show them, and which of these can be seen."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinyvllm.errors import TinyVLLMError
from widgets.topics.base import TOPICS, Topic

if TYPE_CHECKING:
    from widgets.feed import Feed


class Subscription:
    """A topic with the views that look at it."""

    def __init__(self, topic: Topic):
        self.topic = topic
        self.views: dict[str, bool] = {}  # view id -> visible
        self.needs_snapshot = True

    @property
    def visible(self) -> bool:
        return any(self.views.values())


class Subscriptions:
    """What the page says of its views. Used with the feed's lock held."""

    def __init__(self, feed: "Feed"):
        self._feed = feed
        self._by_key: dict[str, Subscription] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def topic(self, key: str) -> Topic | None:
        """The topic that is subscribed to under this key, or None."""
        return self._by_key[key].topic if key in self._by_key else None

    def visible_ones(self) -> list[tuple[str, Subscription]]:
        """(key, subscription) of the topics that somebody sees."""
        return [(key, sub) for key, sub in self._by_key.items() if sub.visible]

    def need_snapshots(self, which: Callable[[Subscription], bool] = lambda sub: True) -> None:
        """What these views have is of no use any more."""
        for sub in self._by_key.values():
            sub.needs_snapshot |= which(sub)

    # ---- one method for each thing that a page says of a view ----

    def ready(self, message: dict) -> None:
        """A view has been drawn and has nothing yet. Raises TinyVLLMError for a topic that there is not."""
        name, params, key = message["topic"], message.get("params") or {}, message["key"]
        sub = self._by_key.get(key)
        if sub is None:
            if name not in TOPICS:
                raise TinyVLLMError(f"a panel asked for {name!r}; there are {', '.join(sorted(TOPICS))}")
            sub = self._by_key[key] = Subscription(TOPICS[name](self._feed, **params))
        sub.views[message["view"]] = message.get("visible", True)
        sub.needs_snapshot = True

    def visible(self, message: dict) -> None:
        """A view came into sight, or went out of it."""
        for sub in self._by_key.values():
            if message["view"] in sub.views:
                was_visible = sub.visible
                sub.needs_snapshot |= message["visible"] and not sub.views[message["view"]]
                sub.views[message["view"]] = message["visible"]
                if was_visible and not sub.visible:
                    sub.topic.hidden()

    def gone(self, message: dict) -> None:
        """A view is no more; the last one takes its topic along."""
        for key, sub in list(self._by_key.items()):
            if sub.views.pop(message["view"], None) is not None and not sub.views:
                sub.topic.close()
                del self._by_key[key]
