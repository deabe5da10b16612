"""The control bar in a real page: every button against the engine's own state."""

import time

import pytest

from tests.browser.stage import Stage
from tinyvllm import LLM, SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.trace import Trace
from widgets.control_bar import ControlBar

LONG = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
STOP_WITHIN_S = 0.15


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", use_tqdm=False, num_blocks=256)


@pytest.fixture
def bar(llm, tmp_path, monkeypatch):
    """(stage, live engine) with a bar whose options are unfolded."""
    monkeypatch.chdir(tmp_path)
    llm.reset(block_size=16, num_blocks=256, enable_prefix_caching=True, use_kv_cache=True, max_num_seqs=32,
              max_num_batched_tokens=2048, scheduling_policy="continuous")
    with LiveEngine(llm, steps_per_second=50) as live, Stage(height=700) as stage:
        feed = stage.feed(live)
        stage.show(ControlBar(feed, options=True, sampling_params=LONG))
        stage.until(lambda: feed.stats.frames > 0 and value(stage, "block_size") == "16")
        yield stage, live
        assert stage.errors == [] and feed.error is None


def do(name):
    return f"[data-do='{name}']"


def value(stage, field):
    return stage.page.input_value(f"[data-field='{field}']")


def counter(stage, name):
    return stage.page.text_content(f"[data-counter='{name}'] b").replace(",", "")


def trouble(stage):
    return stage.page.text_content(".tv-trouble") if stage.page.is_visible(".tv-trouble") else ""


def slide(stage, field, position):
    """Move a slider as a hand does."""
    stage.page.eval_on_selector(f"[data-field='{field}']", """(node, position) => {
        node.value = position; node.dispatchEvent(new Event("input", { bubbles: true })); }""", str(position))


def test_burst_pause_step_run_and_counters(bar):
    stage, live = bar
    stage.page.fill("[data-field='burst-count']", "5")
    stage.page.click(do("burst"))
    stage.until(lambda: live.stats.num_running == 5)
    stage.page.click(do("run"))
    stage.until(lambda: live.state == "paused")
    stage.until(lambda: "Run" in stage.page.text_content(do("run")))
    at = live.stats.num_steps
    stage.page.click(do("step"))
    stage.until(lambda: live.stats.num_steps == at + 1 and live.state == "paused")
    stage.page.click(do("step10"))
    stage.until(lambda: live.stats.num_steps == at + 11 and live.state == "paused")
    stats = live.stats
    stage.until(lambda: counter(stage, "step") == str(stats.num_steps))
    assert counter(stage, "running") == "5" and counter(stage, "waiting") == "0"
    assert counter(stage, "blocks") == f"{stats.num_blocks - stats.num_free_blocks} / {stats.num_blocks}"
    assert stage.page.text_content(".tv-badge") == "CPU · paused"
    stage.page.click(do("run"))
    stage.until(lambda: live.stats.num_steps > at + 12)
    stage.until(lambda: int(counter(stage, "tokens_per_s")) > 0)


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_reaches_the_engine_within_150_ms(bar, how):
    stage, live = bar
    slide(stage, "speed", 0)  # one step in two seconds: stop must not wait for the next one
    slide(stage, "arrivals", 60)
    stage.until(lambda: live.steps_per_second == 0.5)
    stage.page.click(do("burst"))
    stage.until(lambda: live.stats.num_running)
    if how == "button":
        stage.page.locator(do("stop")).dispatch_event("click")
    else:
        stage.page.focus(".tv-control")
        stage.page.keyboard.press("Escape")
    start = time.perf_counter()
    while live.stats.num_running or live.stats.num_waiting:
        stage.turn()
        assert time.perf_counter() - start < STOP_WITHIN_S
    assert live.stats.num_free_blocks == live.stats.num_blocks and live.error is None
    stage.until(lambda: stage.page.text_content("[data-field='arrivals'] + output") == "off")


def test_keys_work_on_the_bar_and_not_in_its_fields(bar):
    stage, live = bar
    page = stage.page
    page.click(do("burst"))
    stage.until(lambda: live.stats.num_running == 8)
    page.keyboard.press(" ")  # after a click on a button the bar has the focus: no second burst
    stage.until(lambda: live.state == "paused")
    assert live.stats.num_running == 8
    at = live.stats.num_steps
    stage.until(lambda: "Run" in page.text_content(do("run")))
    page.keyboard.press("ArrowRight")
    stage.until(lambda: live.stats.num_steps == at + 1)
    page.keyboard.press(" ")
    stage.until(lambda: live.stats.num_steps > at + 1)
    page.focus("[data-field='file']")
    page.keyboard.type("a b")
    page.keyboard.press("ArrowRight")
    stage.run(0.2)
    assert value(stage, "file") == "a b" and live.state == "running" and live.stats.num_running == 8
    page.keyboard.press("Escape")  # out of the field ...
    stage.run(0.2)
    assert live.stats.num_running == 8
    page.keyboard.press("Escape")  # ... and now it is the bar's
    stage.until(lambda: not live.stats.num_running)


def test_speed_policy_and_limits_at_once_and_wrong_ones_in_the_engine_s_words(bar):
    stage, live = bar
    page = stage.page
    slide(stage, "speed", 100)
    stage.until(lambda: live.steps_per_second is None)
    assert page.text_content("[data-field='speed'] + output") == "no limit"
    slide(stage, "speed", 50)
    stage.until(lambda: live.steps_per_second is not None and 5 < live.steps_per_second < 50)
    page.click(do("burst"))
    stage.until(lambda: live.stats.num_running == 8)
    scheduler = live.llm.engine.scheduler
    page.select_option(do("policy"), "static")
    stage.until(lambda: scheduler.policy == "static")
    page.fill("[data-field='max_num_seqs']", "3")
    page.keyboard.press("Enter")
    stage.until(lambda: scheduler.max_num_seqs == 3)
    for wrong in ("0", "-4", "lots", "1e9", "2.5"):
        page.fill("[data-field='max_num_batched_tokens']", wrong)
        page.keyboard.press("Enter")
        stage.until(lambda: "max_num_batched_tokens can be 1 to 2048 here, got" in trouble(stage))
        assert page.get_attribute("[data-field='max_num_batched_tokens']", "aria-invalid") == "true"
        page.fill("[data-field='max_num_batched_tokens']", "1,024")
        page.keyboard.press("Enter")
        stage.until(lambda: scheduler.max_num_batched_tokens == 1024 and trouble(stage) == "")
        live.set_policy(max_num_batched_tokens=2048)
        stage.until(lambda: scheduler.max_num_batched_tokens == 2048)
    assert live.stats.num_running == 8, "wrong options must lose nothing"
    page.keyboard.press("Escape")
    stage.until(lambda: value(stage, "max_num_batched_tokens") == "2048")  # the page follows what a cell does


def test_reset_with_other_options_and_wrong_ones_lose_nothing(bar):
    stage, live = bar
    page = stage.page
    page.click(do("burst"))
    stage.until(lambda: live.stats.num_running == 8)
    page.fill("[data-field='block_size']", "0")
    page.click(do("reset-with"))
    stage.until(lambda: "block_size must be a whole number of 1 or more, got 0" in trouble(stage))
    assert live.stats.num_running == 8 and value(stage, "block_size") == "0"
    page.fill("[data-field='block_size']", "7")
    page.uncheck("[data-field='use_kv_cache']")
    assert page.is_disabled("[data-field='enable_prefix_caching']")
    page.click(do("reset-with"))
    stage.until(lambda: live.stats.num_blocks == 256 * 16 // 7)
    manager = live.llm.engine.kv_cache_manager
    assert (manager.block_size, manager.enable_caching) == (7, False) and not live.llm.engine.scheduler.use_kv_cache
    stage.until(lambda: value(stage, "num_blocks") == str(256 * 16 // 7) and trouble(stage) == "")
    assert live.stats.num_running == 0 and live.error is None


def test_arrivals_from_the_slider(bar):
    stage, live = bar
    slide(stage, "arrivals", 100)
    stage.until(lambda: live.stats.num_running + live.stats.num_waiting > 4)
    assert "50 requests/s" == stage.page.text_content("[data-field='arrivals'] + output")
    stage.until(lambda: "came" in stage.page.text_content("[data-told='arrivals']"))
    slide(stage, "arrivals", 0)
    stage.until(lambda: stage.panels["panel-0"].feed._controls.arrivals.rate == 0)


def test_an_engine_that_failed_says_so_and_reset_helps(bar):
    stage, live = bar
    live.llm.runner.execute = lambda batch: 1 / 0
    stage.page.click(do("burst"))
    stage.until(lambda: "The engine stopped: division by zero. Reset starts it afresh." in trouble(stage))
    assert stage.page.is_disabled(do("run")) and stage.page.text_content(".tv-badge") == "CPU · failed"
    stage.page.click(do("reset"))
    stage.until(lambda: live.error is None and trouble(stage) == "" and not stage.page.is_disabled(do("run")))
    stage.page.click(do("burst"))
    stage.until(lambda: live.stats.num_running == 8)


def test_record_save_replay_and_back(bar):
    stage, live = bar
    page = stage.page
    slide(stage, "speed", 100)
    page.click(do("record"))
    stage.until(lambda: "Save" in page.text_content(do("record")))
    page.fill("[data-field='burst-count']", "3")
    page.click(do("burst"))
    stage.until(lambda: live.stats.num_output_tokens > 30)
    page.keyboard.press("Escape")
    stage.until(lambda: not live.stats.num_running)
    page.fill("[data-field='file']", "no/such/place")
    page.click(do("record"))
    stage.until(lambda: "could not be written" in trouble(stage))
    page.fill("[data-field='file']", "lecture")
    page.click(do("record"))
    stage.until(lambda: "lecture.jsonl" in page.text_content("[data-told='recorded']"))
    trace = Trace.load("lecture.jsonl")
    steps = sum(event.kind == "step_begun" for event in trace.events)
    assert page.text_content("[data-told='recorded']") == f"lecture.jsonl: {len(trace):,} events, {steps} steps"
    page.click(do("replay"))
    stage.until(lambda: page.text_content(".tv-badge").startswith("REPLAY"))
    for name in ("burst", "policy", "record", "reset-with"):
        stage.until(lambda name=name: page.is_disabled(do(name)))
        assert page.get_attribute(do(name), "title").startswith("This is a recorded run: ")
    feed = stage.panels["panel-0"].feed
    assert page.input_value(do("rate")) == "1"
    feed.source.set_rate(0.3)
    stage.until(lambda: page.input_value(do("rate")) == "0.3")
    page.select_option(do("rate"), "at once")
    stage.until(lambda: counter(stage, "step") == str(trace.state().steps[-1].step))
    assert counter(stage, "finished") == "3" and not page.is_disabled(do("reset"))
    page.click(do("live"))
    stage.until(lambda: page.text_content(".tv-badge") == "CPU · paused" and not page.is_disabled(do("burst")))
    assert page.is_hidden(do("live"))


def test_a_page_that_is_drawn_anew_knows_everything(bar):
    stage, live = bar
    slide(stage, "speed", 30)
    slide(stage, "arrivals", 50)
    stage.until(lambda: live.stats.num_running > 0 and live.steps_per_second < 10)
    feed, speed = stage.panels["panel-0"].feed, live.steps_per_second
    stage.remove("panel-0")
    stage.show(ControlBar(feed, options=True))
    stage.until(lambda: counter(stage, "running") == str(live.stats.num_running))
    assert stage.page.text_content("[data-field='speed'] + output") == f"{speed:.1f} steps/s"
    assert stage.page.text_content("[data-field='arrivals'] + output") != "off"


def test_back_to_now_is_offered_while_the_panels_show_the_past(bar):
    stage, _ = bar
    feed = stage.panels["panel-0"].feed
    assert stage.page.is_hidden(do("now"))
    feed.hub.cursor = 5.0
    stage.until(lambda: stage.page.is_visible(do("now")))
    stage.page.click(do("now"))
    stage.until(lambda: feed.hub.cursor is None and stage.page.is_hidden(do("now")))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width, scale", [(1280, 1), (1280, 2), (900, 1), (900, 2)])
def test_nothing_is_cut_off(llm, theme, width, scale):
    with LiveEngine(llm) as live, Stage(width=width, height=900, theme=theme) as stage:
        stage.show(ControlBar(stage.feed(live), options=True, scale=scale))
        stage.until(lambda: counter(stage, "blocks") != "–")
        wide, right = stage.page.evaluate("""() => [document.documentElement.scrollWidth, Math.max(
            ...[...document.querySelectorAll('.tv-control *')].map((n) => n.getBoundingClientRect().right))]""")
        assert wide <= width and right <= width
        assert stage.errors == []


def test_what_has_not_changed_is_not_written(llm):
    """A text that is written anew is laid out anew, though it is the same."""
    with LiveEngine(llm, paused=True) as live, Stage() as stage:
        feed = stage.feed(live)
        stage.show(ControlBar(feed))
        stage.until(lambda: stage.page.locator(".tv-counter b").first.inner_text() != "")
        stage.page.wait_for_timeout(300)
        stage.page.evaluate("""() => {
          window.written = [];
          const note = (all) => written.push(
            ...all.map((m) => `${m.type} ${m.attributeName} ${m.target.outerHTML || m.target.data}`));
          new MutationObserver(note).observe(document.querySelector(".tv-panel"),
            { subtree: true, childList: true, characterData: true, attributes: true });
          const hub = Object.values(models).find((model) => model.tinyvllmClient), client = hub.tinyvllmClient;
          for (let i = 0; i < 5; i++) for (const listener of client.listeners) listener(client.live, client.now);
        }""")
        stage.page.wait_for_timeout(100)
        assert stage.page.evaluate("written") == []
        assert stage.errors == [] and feed.error is None
