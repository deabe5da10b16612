"""SchedulerComparison in a real page: bars where the figures put them, the same selection in every run."""

import pytest

from tests.browser.stage import Stage
from tests.test_comparison import continuous, static
from widgets.scheduler_timeline import SchedulerComparison


@pytest.fixture
def shown():
    with Stage(height=800) as stage:
        feed = stage.feed(None)
        panel = SchedulerComparison({"static": static(), "<b>continuous</b>": continuous()}, feed)
        stage.show(panel)
        stage.until(lambda: stage.page.locator("canvas").evaluate("n => n.dataset.bars") == "6")
        yield stage, feed, panel
        assert stage.errors == []


def drawn(stage):
    return stage.page.locator("canvas").evaluate("n => n.drawn")


def settle(stage):
    stage.turn()
    stage.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def cell(stage, row, run):
    return stage.page.locator(f"tr[data-row={row}] td").nth(run).inner_text().replace("\u00a0", " ")


def check_places(stage, panel, axis):
    """Every bar begins and ends where its figures say, on one axis for all runs."""
    per_unit = float(stage.page.locator("canvas").evaluate("n => n.dataset.perUnit"))
    origin = None
    for bar in drawn(stage):
        run = next(run for run in panel.figures["runs"] if run["name"] == bar["run"])
        begin, _, end = next(b for b in run["bars"] if b["id"] == bar["id"])[axis]
        origin = bar["x"] - begin * per_unit if origin is None else origin
        assert bar["x"] == pytest.approx(origin + begin * per_unit, abs=0.01)
        assert bar["w"] == pytest.approx((end - begin) * per_unit, abs=0.01)


def test_bars_lie_where_the_figures_put_them_on_both_axes(shown):
    stage, feed, panel = shown
    check_places(stage, panel, "steps")
    assert [cell(stage, row, 0) for row in ("total", "idle", "wasted", "ttft", "rate")] == [
        "6", "4 = 33%", "2", "1.7 · 1 · 3", "1.33"]
    assert [cell(stage, row, 1) for row in ("total", "idle", "wasted")] == ["4", "0 = 0%", "0"]
    stage.page.get_by_role("button", name="axis: steps").click()
    settle(stage)
    check_places(stage, panel, "time")
    assert cell(stage, "total", 0) == "60 ms" and cell(stage, "rate", 1) == "200"
    assert stage.page.locator(".tv-comparison b").count() == 0  # a name is text


def test_a_click_selects_the_request_in_every_run_and_keys_do_too(shown):
    stage, feed, panel = shown
    box = stage.page.locator("canvas").bounding_box()
    bar = next(b for b in drawn(stage) if b["id"] == "c")
    stage.page.mouse.click(box["x"] + bar["x"] + bar["w"] / 2, box["y"] + bar["y"] + bar["h"] / 2)
    stage.until(lambda: feed.selection["request"] == "c")
    stage.page.keyboard.press("ArrowUp")
    stage.until(lambda: feed.selection["request"] == "b")
    stage.page.keyboard.press("t")
    stage.until(lambda: stage.page.locator("canvas").evaluate("n => n.dataset.axis") == "time")
    stage.page.keyboard.press("Escape")
    stage.until(lambda: feed.selection["request"] is None)
    stage.page.mouse.move(box["x"] + bar["x"] + 4, box["y"] + bar["y"] + 4)


def test_an_empty_seat_is_striped_red_while_somebody_waits_in_both_themes(shown):
    stage, feed, panel = shown
    for theme in ("light", "dark"):
        stage.set_theme(theme)
        stage.run(0.1)
        settle(stage)
        b = next(bar for bar in drawn(stage) if bar["id"] == "b" and bar["run"] == "static")
        red = """(n, [x, y, w, h]) => { const d = n.getContext("2d").getImageData(x, y, w, h).data; let found = 0;
            for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 100 && d[i] > 180 && d[i] > d[i + 2] + 60) found += 1;
            return found; }"""
        after = [round(b["x"] + b["w"] + 8), round(b["y"] + 4), round(b["w"] - 16), round(b["h"] - 10)]
        assert stage.page.locator("canvas").evaluate(red, after) > 100  # c waits: steps 2 to 4
        c = next(bar for bar in drawn(stage) if bar["id"] == "c" and bar["run"] == "static")
        below = [round(c["x"] + 8), round(b["y"] + 4), round(c["w"] - 16), round(b["h"] - 10)]
        assert stage.page.locator("canvas").evaluate(red, below) == 0  # nobody waits any more
    stage.errors[:] = [text for text in stage.errors if "willReadFrequently" not in text]


def test_different_work_is_said_to_be_different():
    with Stage(width=900) as stage:
        odd = continuous()
        odd.events[:] = [e for e in odd.events if e.request_id != "c" and not (e.kind == "tokens" and e.t_ns > 2e7)]
        stage.show(SchedulerComparison({"static": static(), "other": odd}, stage.feed(None), scale=2))
        stage.until(lambda: stage.page.is_visible(".tv-trouble"))
        assert "not serve the same requests" in stage.page.inner_text(".tv-trouble")
        assert stage.page.evaluate("document.documentElement.scrollWidth") <= 900 and stage.errors == []
