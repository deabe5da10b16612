"""SchedulerTimeline in a real page: what it draws against the engine's own state, and what a hand can do with it."""

import pytest

from tests.browser.stage import Stage
from tinyvllm import LLM, SamplingParams
from tinyvllm.engine.arrivals import run_arrivals
from tinyvllm.engine.events import Event
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from widgets.scheduler_timeline import SchedulerTimeline

CONFIG = {"num_blocks": 64, "block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 256, "use_kv_cache": True,
          "max_model_len": 2048, "scheduling_policy": "continuous", "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", use_tqdm=False, max_num_seqs=4, max_num_batched_tokens=32, num_blocks=64)


@pytest.fixture(scope="module")
def trace(llm):
    """Five requests for four seats, with chunks, waiting and prefixes found: the same steps each time."""
    arrivals = [(0, 70, 40), (0, 20, 30, 16), (4, 40, 20, 16), (6, 10, 50), (8, 30, 12, 16)]
    run_arrivals(llm, arrivals)  # compiles what is not compiled yet
    return run_arrivals(llm, arrivals)


def node(stage):
    return stage.page.locator("canvas").first


def data(stage):
    return {name: value if value in ("true", "false", "time", "steps") else float(value)
            for name, value in node(stage).evaluate("n => ({...n.dataset})").items()}


def bars(stage):
    return {bar["id"]: bar for bar in node(stage).evaluate("n => n.drawn")}


def corner(stage):
    box = node(stage).bounding_box()
    return box["x"], box["y"], box["width"], box["height"]


def settle(stage):
    """Everything that was said has arrived, and is drawn."""
    stage.turn()
    stage.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def replayed(stage, trace, **options):
    """A panel on a recorded run that has been played to its end."""
    engine = ReplayEngine(trace, rate=float("inf"))
    feed = stage.feed(engine)
    stage.show(SchedulerTimeline(feed, **options))
    steps = len(trace.state(None).steps)
    stage.until(lambda: data(stage)["steps"] >= min(steps, 5000) and engine.state == "idle")
    stage.page.get_by_role("button", name="Whole run").click()
    settle(stage)
    return feed, engine


def test_bars_chunks_and_steps_are_those_of_the_run(trace):
    state = trace.state()
    with Stage() as stage:
        feed, engine = replayed(stage, trace)
        seen, drawn = data(stage), bars(stage)
        assert seen["steps"] == len(state.steps) and set(drawn) == set(state.requests)
        chunks = sum(row[2] > 1 or row[1] < state.requests[row[0]].num_prompt_tokens
                     for step in state.steps for row in step.batch)
        assert seen["chunks"] == chunks > 5  # the long prompt came in pieces, beside the others
        x, y, width, _ = corner(stage)
        pixels_a_ms = width / (seen["high"] - seen["low"])
        wide = sum((span.end_ns - span.start_ns) / 1e6 * pixels_a_ms >= 0.3  # less is nothing to be seen
                   for r in state.requests.values() for span in r.spans)
        assert seen["open"] == 0 and seen["bars"] == wide >= 10
        for request_id, request in state.requests.items():
            at = [(feed.ms(t) - seen["low"]) / (seen["high"] - seen["low"]) * width
                  for t in (request.added_ns, request.finished_ns)]
            bar = drawn[request_id]
            assert bar["x"] == pytest.approx(at[0], abs=0.5)
            assert bar["x"] + bar["w"] == pytest.approx(at[1], abs=2.1)
        stage.page.get_by_role("button", name="axis: time").click()  # every step as wide as any other
        stage.page.get_by_role("button", name="Whole run").click()
        settle(stage)
        seen, drawn = data(stage), bars(stage)
        ended = {r: next(i for i, s in reversed(list(enumerate(state.steps))) if r in [row[0] for row in s.batch]) + 1
                 for r in state.requests}
        for request_id, bar in drawn.items():
            right = (ended[request_id] - seen["low"]) / (seen["high"] - seen["low"]) * width
            assert bar["x"] + bar["w"] == pytest.approx(right, abs=2.1)
        assert stage.errors == [] and feed.error is None
        engine.close()


def test_a_click_on_a_step_shows_its_batch_and_one_on_a_bar_its_figures(trace):
    state = trace.state()
    with Stage() as stage:
        feed, engine = replayed(stage, trace, axis="steps")
        seen, (x, y, width, _) = data(stage), corner(stage)
        wanted = next(i for i, step in enumerate(state.steps) if len(step.batch) == 4)
        place = x + (wanted + 0.5 - seen["low"]) / (seen["high"] - seen["low"]) * width
        stage.page.mouse.click(place, y + 50)
        stage.until(lambda: feed.selection["step"] == state.steps[wanted].step
                    and stage.page.is_visible(".tv-timeline-step"))
        table = stage.page.locator(".tv-timeline-step tr").all_inner_texts()[1:]
        assert [row.split("\t")[:3] for row in table] == [[r, str(start), str(count)]
                                                         for r, start, count, _ in state.steps[wanted].batch]
        assert [row.split("\t")[4] for row in table] == ["yes" if r[3] else "no" for r in state.steps[wanted].batch]
        bar = bars(stage)["3"]
        stage.page.mouse.click(x + bar["x"] + bar["w"] / 2, y + bar["y"] + bar["h"] / 2)
        stage.until(lambda: feed.selection["request"] == "3" and stage.page.is_visible(".tv-timeline-request"))
        text = stage.page.inner_text(".tv-timeline-request")
        ttft = state.requests["3"].ttft_ns / 1e6
        assert "Request 3" in text and "50 tokens" in text and (f"{ttft:.2f} ms" in text or f"{ttft:.0f} ms" in text)
        feed.select(request="2", step=1)  # from another panel
        stage.until(lambda: "Request 2" in stage.page.inner_text(".tv-timeline-request")
                    and "Step 1:" in stage.page.inner_text(".tv-timeline-step"))
        assert "16 of them cached" in stage.page.inner_text(".tv-timeline-request")
        node(stage).focus()
        stage.page.keyboard.press("Escape")
        stage.until(lambda: feed.selection["step"] is None and feed.selection["request"] is None)
        assert not stage.page.is_visible(".tv-timeline-step") and not stage.page.is_visible(".tv-timeline-request")
        assert stage.errors == []
        engine.close()


def test_open_bars_grow_as_the_engine_goes_and_a_pan_holds_the_view(llm):
    with LiveEngine(llm, steps_per_second=100) as live, Stage() as stage:
        feed = stage.feed(live)
        stage.show(SchedulerTimeline(feed, window=5000))
        assert data(stage)["requests"] == 0
        for i in range(6):
            live.add([5 + i] * 50, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
        stage.until(lambda: data(stage)["open"] == 6)
        before = bars(stage)
        stage.run(0.4)
        after = bars(stage)
        assert all(after[i]["x"] + after[i]["w"] > before[i]["x"] + before[i]["w"] for i in before)
        stage.until(lambda: "4 running, 2 waiting" in stage.page.text_content(".tv-spoken"))
        live.abort("0")
        stage.until(lambda: data(stage)["open"] == 5)
        x, y, width, height = corner(stage)
        stage.page.mouse.move(x + 400, y + height - 20)
        stage.page.mouse.down()
        stage.page.mouse.move(x + 300, y + height - 20, steps=4)
        stage.page.mouse.up()
        settle(stage)
        held = data(stage)
        assert held["follow"] == "false"
        stage.run(0.3)
        assert data(stage)["low"] == held["low"] and data(stage)["steps"] > held["steps"]
        stage.page.keyboard.press("End")
        stage.until(lambda: data(stage)["follow"] == "true")

        live.reset()
        stage.until(lambda: data(stage)["requests"] == 0 and data(stage)["steps"] == 0)
        live.add([7] * 20, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), "after the reset")
        stage.until(lambda: live.state == "idle" and data(stage)["steps"] == live.stats.num_steps)
        assert list(bars(stage)) == ["after the reset"]
        assert stage.errors == [] and feed.error is None


def test_keys_and_wheel_zoom_and_pan_and_the_wheel_is_the_pages_until_a_click(trace):
    with Stage() as stage:
        feed, engine = replayed(stage, trace)
        x, y, width, height = corner(stage)
        start = data(stage)
        span = start["high"] - start["low"]
        stage.page.evaluate("document.activeElement.blur()")
        stage.page.mouse.move(x + width / 4, y + height - 5)
        stage.page.mouse.wheel(0, -300)
        settle(stage)
        assert data(stage)["high"] == start["high"]
        node(stage).focus()
        stage.page.mouse.wheel(0, -300)
        stage.until(lambda: data(stage)["high"] - data(stage)["low"] < span * 0.9)
        zoomed = data(stage)
        under = [d["low"] + (d["high"] - d["low"]) / 4 for d in (start, zoomed)]
        assert under[0] == pytest.approx(under[1], abs=span * 0.002)  # what is under the mouse stays there
        for key, test in (("+", lambda a, b: b["high"] - b["low"] < a["high"] - a["low"]),
                          ("-", lambda a, b: b["high"] - b["low"] > a["high"] - a["low"]),
                          ("ArrowRight", lambda a, b: b["low"] > a["low"]),
                          ("ArrowLeft", lambda a, b: b["low"] < a["low"]),
                          ("Home", lambda a, b: b["low"] == start["low"] and b["high"] == start["high"]),
                          ("t", lambda a, b: b["axis"] == "steps"), ("t", lambda a, b: b["axis"] == "time"),
                          ("End", lambda a, b: b["follow"] == "true")):
            before = data(stage)
            stage.page.keyboard.press(key)
            stage.until(lambda: test(before, data(stage)))  # noqa: B023 - called at once
        stage.page.keyboard.press("ArrowDown")
        stage.until(lambda: feed.selection["request"] == "0")
        stage.page.keyboard.press("ArrowDown")
        stage.until(lambda: feed.selection["request"] == "1")
        stage.page.keyboard.press("[")
        stage.until(lambda: feed.selection["step"] == feed.state.steps[-1].step)
        assert stage.errors == []
        engine.close()


def test_dragging_the_scale_moves_the_cursor_of_all_panels_and_end_gives_it_back(trace):
    with Stage() as stage:
        feed, engine = replayed(stage, trace)
        seen, (x, y, width, _) = data(stage), corner(stage)
        stage.page.mouse.move(x + width * 0.7, y + 8)
        stage.page.mouse.down()
        stage.page.mouse.move(x + width * 0.4, y + 8, steps=5)
        stage.page.mouse.up()
        stage.run(0.2)  # it tells the others at most every 50 ms
        wanted = seen["low"] + 0.4 * (seen["high"] - seen["low"])
        stage.until(lambda: feed.hub.cursor is not None and abs(feed.hub.cursor - wanted) < 0.01 * wanted)
        step = next(s for s in reversed(feed.state.steps) if feed.ms(s.begin_ns) <= feed.hub.cursor)
        stage.until(lambda: f"step {step.step}:" in stage.page.inner_text(".tv-timeline-status"))
        ends = [feed.ms(s.end_ns) for s in feed.state.steps if feed.ms(s.end_ns) < feed.hub.cursor]
        stage.page.keyboard.press("Shift+ArrowLeft")
        stage.until(lambda: feed.hub.cursor == pytest.approx(ends[-1]))
        stage.page.keyboard.press("Shift+ArrowLeft")
        stage.until(lambda: feed.hub.cursor == pytest.approx(ends[-2]))
        stage.page.keyboard.press("Shift+ArrowRight")
        stage.until(lambda: feed.hub.cursor == pytest.approx(ends[-1]))
        assert data(stage)["requests"] == 5  # the timeline goes on showing all of it
        stage.page.keyboard.press("End")
        stage.until(lambda: feed.hub.cursor is None)
        assert stage.errors == []
        engine.close()


def burst(num_steps, big):
    """A run of 4,000 steps a second; step `big` has 200 tokens, the others one."""
    events, t = [Event(0, 0, "engine_config", 0, None, CONFIG, None)], 0

    def add(kind, step, request_id=None, a=None, b=None):
        events.append(Event(len(events), t, kind, step, request_id, a, b))

    add("request_added", 0, "r", 1, 99999)
    add("request_scheduled", 1, "r", 0, 0)
    for step in range(1, num_steps + 1):
        count = 200 if step == big else 1
        add("step_begun", step, None, count, [["r", step, count, True]])
        t += 200_000
        add("step_ended", step, None, 190_000)
        add("tokens", step, None, [["r", 1, ""]])
        t += 50_000
    return Trace(events, {})


def test_four_thousand_steps_a_second_are_merged_by_their_maximum_and_drawn_quickly():
    with Stage() as stage:
        stage.page.evaluate("""() => { window.cost = []; const frame = window.requestAnimationFrame.bind(window);
            window.requestAnimationFrame = (f) => frame((t) => { const a = performance.now(); f(t);
                                                                 cost.push(performance.now() - a); }); }""")
        feed, engine = replayed(stage, burst(5000, big=3000))
        x, y, width, _ = corner(stage)
        seen = data(stage)
        assert seen["columns"] <= width and seen["steps"] == 5000
        column = round((feed.ms(feed.state.steps[2999].begin_ns) - seen["low"]) / (seen["high"] - seen["low"]) * width)
        orange = node(stage).evaluate("""(n, x) => { const c = n.getContext("2d"); let found = 0;
            for (let i = x - 2; i <= x + 2; i++) { const [r, g, b] = c.getImageData(i, 40, 1, 1).data;
                if (r > 200 && g > 120 && b < 60) found += 1; } return found; }""", column)
        assert orange >= 1  # one step in four thousand, and it is seen
        stage.page.evaluate("cost.length = 0")
        node(stage).focus()
        for _ in range(20):
            stage.page.keyboard.press("ArrowLeft")
            stage.run(0.02)
        assert sorted(stage.page.evaluate("cost"))[10] < 16  # ms; one at rest takes about 1
        assert [text for text in stage.errors if "willReadFrequently" not in text] == []  # that was this test
        engine.close()


def test_two_hundred_requests_scroll_and_odd_names_stay_text(llm):
    llm.reset(max_num_seqs=4, max_num_batched_tokens=32)
    names = ["<b>bold</b>", "my-request-17", "狐🦊", "a very long name " * 8]
    with LiveEngine(llm, paused=True) as live, Stage(width=900, theme="dark") as stage:
        feed = stage.feed(live)
        stage.show(SchedulerTimeline(feed, scale=2))
        for i in range(200):
            live.add([i + 1] * 30, SamplingParams(temperature=0, max_tokens=5), names[i] if i < len(names) else None)
        live.step(30)
        stage.until(lambda: data(stage)["requests"] == 200 and live.state == "paused")
        assert data(stage)["lanes"] == 200
        assert len(bars(stage)) < 60  # those in view
        node(stage).focus()
        for _ in range(80):
            stage.page.keyboard.press("PageDown")
        settle(stage)
        assert max(bar["lane"] for bar in bars(stage).values()) == 199
        stage.page.keyboard.press("a")
        settle(stage)
        assert len(bars(stage)) > 100
        feed.select(request=names[0])
        stage.until(lambda: names[0] in stage.page.inner_text(".tv-timeline-request"))
        assert stage.page.locator(".tv-panel b").count() == 0
        assert stage.page.evaluate("document.documentElement.scrollWidth") <= 900
        assert stage.errors == [] and feed.error is None


def test_a_page_reload_brings_the_same_picture(trace):
    with Stage() as stage:
        feed, engine = replayed(stage, trace)
        before, shown = data(stage), bars(stage)
        feed.hub.cursor, step = 3.0, feed.state.steps[5].step
        feed.select(step=step)
        stage.remove("panel-0")
        stage.show(SchedulerTimeline(feed))
        stage.until(lambda: stage.page.locator("canvas").count() and data(stage)["steps"] == before["steps"])
        stage.page.get_by_role("button", name="Whole run").click()
        stage.until(lambda: stage.page.is_visible(".tv-timeline-step"))
        settle(stage)
        again = bars(stage)
        assert {k: (v["x"], v["w"], v["lane"]) for k, v in again.items()} == {
            k: (v["x"], v["w"], v["lane"]) for k, v in shown.items()}
        assert data(stage)["chunks"] == before["chunks"] and stage.errors == []
        engine.close()
