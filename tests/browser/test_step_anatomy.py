"""StepAnatomy in a browser: what is drawn is the step's own batch, its times, and the probe's measurement."""

import pytest

from tests.browser.stage import Stage
from tests.browser.test_looks import LOOKS
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.bench.ceilings import Ceilings
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from widgets.step_anatomy import StepAnatomy

PROMPT = list(range(30, 90))
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", use_tqdm=False, max_num_seqs=8, max_num_batched_tokens=64, enable_prefix_caching=False)


@pytest.fixture
def live(llm):
    with LiveEngine(llm, paused=True) as engine:
        yield engine
        engine.abort()
        engine.resume()
        engine.wait_idle()


@pytest.fixture(params=["light"])
def stage(request):
    with Stage(theme=request.param) as stage:
        yield stage
        assert stage.errors == []


def show(stage, live, **options):
    """(feed, the panel's root, its data attributes on demand)."""
    feed = stage.feed(live)
    feed.select(step=None)
    root = stage.page.locator(f"#{stage.show(StepAnatomy(feed, **options))} section")
    return feed, root, lambda: root.evaluate("e => ({...e.dataset})")


def step(stage, live, dataset, count=1):
    """Run steps, and wait until the page shows the last of them."""
    before = live.llm.engine.num_steps
    live.step(count)
    stage.until(lambda: live.llm.engine.num_steps == before + count)
    stage.until(lambda: dataset()["step"] == str(before + count))


def take_apart(stage, live, dataset):
    """The button, then a step; returns the probe's own profile."""
    known = int(dataset()["profiles"])
    stage.page.click("text=take the next step apart")
    stage.until(lambda: dataset()["waiting"] == "true")
    step(stage, live, dataset)
    stage.until(lambda: int(dataset()["profiles"]) == known + 1)
    return live.llm.probe.last_profile


@pytest.mark.parametrize("stage", ["light", "dark"], indirect=True)
def test_the_batch_is_the_engines(stage, live):
    feed, root, dataset = show(stage, live)
    assert "Nothing has run yet" in root.inner_text()
    for i in range(3):
        live.add(PROMPT[i:], GREEDY)
    for _ in range(4):
        step(stage, live, dataset)
        engine_step = feed.state.steps[-1]
        assert dataset()["requests"] == str(len(engine_step.batch))
        assert dataset()["tokens"] == str(engine_step.num_tokens)
        stage.run(0.05)
        assert root.locator("canvas").nth(0).get_attribute("data-drawn") == str(len(engine_step.batch))


def test_a_step_taken_apart_shows_the_probes_times_and_moves_along_the_roofline(stage, live):
    feed, root, dataset = show(stage, live)
    live.add(PROMPT, GREEDY)
    table, roof = root.locator("canvas").nth(1), root.locator("canvas").nth(2)
    for kind in ("prefill", "decode"):
        profile = take_apart(stage, live, dataset)
        assert float(dataset()["totalNs"]) == sum(row[2] for row in profile.operations)
        names = list(dict.fromkeys(row[0] for row in profile.operations))
        assert dataset()["operations"] == str(len(names))
        stage.until(lambda names=names: table.get_attribute("data-lines") == str(len(names)))
        slowest = max(names, key=lambda name: sum(row[2] for row in profile.operations if row[0] == name))
        if kind == "prefill":
            assert dataset()["chosen"] == slowest
    stage.until(lambda: roof.get_attribute("data-roofs") and roof.get_attribute("data-steps") == "2")
    roofs = live.between_steps(lambda llm: llm.probe.ceilings()).result(10)
    expected = ",".join(str(n).removesuffix(".0") for n in (roofs.bandwidth, roofs.peak))
    assert roof.get_attribute("data-roofs") == expected
    dots = dict(text.split(":") for text in roof.get_attribute("data-intensities").split())
    assert dots.keys() == {"prefill", "decode"} and float(dots["prefill"]) > 4 * float(dots["decode"])
    decode = live.llm.probe.last_profile.operations
    assert float(dots["decode"]) == pytest.approx(sum(r[4] for r in decode) / sum(r[3] for r in decode))
    assert feed.error is None


def test_the_keyboard_walks_steps_and_operations(stage, live):
    feed, root, dataset = show(stage, live)
    live.add(PROMPT, GREEDY)
    take_apart(stage, live, dataset)
    step(stage, live, dataset, 3)
    first = feed.state.steps[-1].step - 3
    root.locator("canvas").nth(1).focus()
    stage.page.keyboard.press("ArrowLeft")
    stage.until(lambda: dataset()["step"] == str(first + 2))
    assert feed.selection["step"] == first + 2
    names = list(dict.fromkeys(row[0] for row in live.llm.probe.last_profile.operations))
    for _ in names:
        stage.page.keyboard.press("ArrowUp")
    assert dataset()["chosen"] == names[0]
    stage.page.keyboard.press("ArrowDown")
    assert dataset()["chosen"] == names[1]
    feed.select(step=first)
    stage.until(lambda: dataset()["step"] == str(first) and dataset()["profiled"] == str(first))
    stage.page.keyboard.press("Escape")
    stage.until(lambda: dataset()["step"] == str(first + 3))
    stage.page.keyboard.press("Enter")
    stage.until(lambda: dataset()["waiting"] == "true")
    step(stage, live, dataset)


def test_auto_takes_a_step_apart_about_once_a_second_while_it_can_be_seen(stage, live):
    feed, root, dataset = show(stage, live)
    live.add(PROMPT, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    live.set_speed(40)
    stage.page.click("text=auto")
    live.resume()
    stage.run(3.3)
    assert 2 <= int(dataset()["profiles"]) <= 5
    panel_id = root.evaluate("e => e.parentElement.id")
    stage.page.evaluate("(id) => { document.getElementById(id).style.display = 'none'; }", panel_id)
    stage.run(0.4)
    seen = sum(event.kind == "step_profiled" for event in live.events.read()[0])
    stage.run(1.5)
    assert sum(event.kind == "step_profiled" for event in live.events.read()[0]) <= seen + 1
    live.set_speed(None)


@pytest.mark.parametrize("width", [1280, 900])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_nothing_is_cut_off(live, width, scale):
    with Stage(width=width, height=1400) as stage:
        _, root, dataset = show(stage, live, scale=scale)
        live.add(PROMPT, GREEDY, request_id="a request with a rather long name 🦊 " * 3)
        take_apart(stage, live, dataset)
        stage.run(0.2)
        assert stage.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        edge = root.bounding_box()["x"] + root.bounding_box()["width"]
        for node in root.locator("canvas, button").all():
            assert node.bounding_box()["x"] + node.bounding_box()["width"] <= edge + 1
        assert stage.errors == []


@pytest.mark.parametrize("ridge", [20, 60])
def test_the_last_number_of_the_roofline_s_axis_is_whole(live, monkeypatch, ridge):
    """Where it ends depends on the machine: at 100 and at 1,000 flops a byte."""
    machine = Ceilings("a machine", bandwidth=1e10, cache_bandwidth=2e10, peak=ridge * 1e10, arithmetic="")
    monkeypatch.setattr("tinyvllm.probe.probe.ceilings", lambda device: machine)
    with Stage(width=1280, height=1400) as stage:
        stage.page.evaluate(f"() => {{ window.looks = {LOOKS}; looks.rememberTexts(); }}")
        _, _, dataset = show(stage, live)
        live.add(PROMPT, GREEDY)
        take_apart(stage, live, dataset)
        stage.run(0.5)
        assert stage.page.evaluate("looks.faults(1)") == []


def test_a_recorded_run_is_shown_with_its_profiles_and_takes_no_new_ones(stage, live):
    live.add(PROMPT, GREEDY)
    live.between_steps(lambda llm: llm.probe.profile_next_step()).result(10)
    live.step()
    stage.until(lambda: any(event.kind == "step_profiled" for event in live.events.read()[0]))
    with ReplayEngine(Trace(live.events.read()[0]), rate=float("inf")) as replay:
        replay.wait_idle()
        _, root, dataset = show(stage, replay)
        stage.until(lambda: dataset()["profiles"] == "1" and root.locator("button", has_text="apart").is_disabled())
        assert float(dataset()["totalNs"]) == sum(row[2] for row in live.llm.probe.last_profile.operations)
        assert "recording" in root.inner_text() and root.locator(".tv-trouble").is_hidden()
