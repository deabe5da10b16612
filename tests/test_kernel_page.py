"""A kernel without a browser: a client that runs code, is a page with views, and acknowledges frames."""

import pytest

from tests.kernel_page import KernelPage

pytest.importorskip("ipykernel")


def test_a_client_takes_the_place_of_the_page():
    with KernelPage() as page:
        assert page.python("import time; print(1 + 1); time.sleep(0.01); print(3)") == "2\n3\n"
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            page.python("1 / 0")
        assert page.errors == ["division by zero"]
        page.python("""
import sys; sys.path.insert(0, ".")
from tests.feed_share import Bench
from widgets import Dashboard
bench = Bench("demo", "cpu", 2, 100)
dashboard = Dashboard(bench.live, panels=("SchedulerTimeline", "KVBlockMap"))
feed = dashboard.feed""")
        page.listen(page.python("print(feed.hub.model_id)").strip(), {"timeline": {}, "blocks": {}})
        page.wait(1.5)
        told = "print(feed.stats.frames, len(feed.stats.latency_ms), feed.error)"
        frames, acknowledged, error = page.python(told).split()
        assert int(frames) > 5 and int(acknowledged) > 5 and error == "None"
        page.show(False)
        page.wait(0.5)
        hidden = page.python(told)
        page.wait(0.5)
        assert page.python(told) == hidden  # nobody sees it: nothing is sent
        page.show(True)
        page.wait(0.5)
        assert int(page.python(told).split()[0]) > int(hidden.split()[0])
