"""What a class sees on the wall: every panel, full, at both scales and in JupyterLab's three themes."""

from pathlib import Path

import pytest

from tests.browser import stage as stages
from tests.browser.stage import Stage
from tests.test_comparison import continuous, static
from tinyvllm import LLM, LiveEngine, SamplingParams
from widgets import BitLens, ControlBar, KVBlockMap, SchedulerTimeline, StepAnatomy, TensorFile, TokenRace, TokenTrail
from widgets.attention_scope import AttentionScope
from widgets.panel import module, stylesheet
from widgets.scheduler_timeline import SchedulerComparison

PANELS = (ControlBar, SchedulerTimeline, KVBlockMap, TokenRace, AttentionScope, StepAnatomy, TokenTrail, BitLens)
LONG_NAME = "a-name-that-somebody-gave-to-a-request-000017"
# The colours of JupyterLab's own themes: layout 0, 1, 2, font 1, 2, border 1, 2, brand.
VARIABLES = ("layout-color0", "layout-color1", "layout-color2", "ui-font-color1", "ui-font-color2", "border-color1",
             "border-color2", "brand-color1")
THEMES = {
    "light": "#ffffff #ffffff #eeeeee rgba(0,0,0,.87) rgba(0,0,0,.54) #bdbdbd #e0e0e0 #1976d2",
    "dark": "#111111 #212121 #424242 rgba(255,255,255,.87) rgba(255,255,255,.54) #616161 #424242 #2196f3",
    "dark high contrast": "#111111 #111111 #424242 #ffffff #ffffff #ffffff #e0e0e0 #319bf2",
}
LOOKS = (Path(__file__).parent / "looks.js").read_text(encoding="utf-8")


@pytest.fixture
def themes(monkeypatch):
    """The stage has the colours of JupyterLab's themes; returns their names."""
    for name, colours in THEMES.items():
        monkeypatch.setitem(stages.THEMES, name, {f"--jp-{v}": c for v, c in zip(VARIABLES, colours.split())})
    return list(THEMES)


def fill(stage, live, feed):
    """Running, waiting, preempted and finished requests, a step taken apart, a value under the lens."""
    live.add("Tell me a long story about a fox who lost a lantern, " * 9,
             SamplingParams(max_tokens=60, ignore_eos=True), LONG_NAME)
    for i in range(10):
        story = f"Tell me a story about a fox and {'a lantern' if i % 3 else 'an owl'}."
        live.chat([{"role": "user", "content": story}],
                  SamplingParams(seed=i, max_tokens=10 if i == 0 else 60, ignore_eos=True))
    live.step(45)
    stage.until(lambda: live.llm.engine.num_steps == 45)
    stage.page.click("text=take the next step apart")
    stage.run(0.2)
    live.step(1)
    stage.until(lambda: live.llm.engine.num_steps == 46)
    stage.until(lambda: stage.page.locator("[aria-label='Step anatomy']").get_attribute("data-profiles") == "1")
    kinds = {span.kind for request in feed.state.requests.values() for span in request.spans}
    assert kinds == {"waiting", "prefill", "decode", "preempted"}
    feed.select(request=LONG_NAME, token=20, layer=3, head=2, block=1)
    feed.inspect("weight", name="model.norm.weight", row=5)
    stage.run(1)


def test_nothing_is_cut_off_out_of_reach_or_too_pale_at_1280_pixels(themes):
    llm = LLM("demo", use_tqdm=False, block_size=8, num_blocks=48, max_num_seqs=6, max_num_batched_tokens=48)
    with LiveEngine(llm, paused=True) as live, Stage(height=9000) as stage:
        stage.page.evaluate(f"() => {{ window.looks = {LOOKS}; looks.rememberTexts(); }}")
        feed = stage.feed(live)
        panels = [panel(feed) for panel in PANELS]
        panels.append(TensorFile(feed, tensor="model.layers.3.self_attn.q_proj.weight"))
        panels.append(SchedulerComparison({"static": static(), "continuous": continuous()}, stage.feed(None)))
        for panel in panels:
            stage.show(panel)
        fill(stage, live, feed)
        for scale in (1, 2):
            for panel in panels:
                panel.scale = scale
            for theme in themes:
                stage.set_theme(theme)
                stage.run(0.6)
                assert stage.page.evaluate("(scale) => looks.faults(scale)", scale) == [], (scale, theme)
        assert stage.errors == []
        live.abort()
        live.resume()


def test_a_projector_of_720_lines_shows_the_whole_timeline():
    llm = LLM("demo", use_tqdm=False)
    with LiveEngine(llm, paused=True) as live, Stage(height=720) as stage:
        feed = stage.feed(live)
        stage.show(SchedulerTimeline(feed, scale=2))
        live.chat([{"role": "user", "content": "Tell me a story."}], SamplingParams(max_tokens=5))
        live.step(3)
        stage.until(lambda: feed.state.steps and stage.page.locator("canvas").get_attribute("data-steps") == "3")
        stage.run(0.2)
        boxes = [node.bounding_box() for node in stage.page.locator("canvas, .tv-legend").all()]
        assert max(box["y"] + box["height"] for box in boxes) < 720
        stage.page.set_viewport_size({"width": 1280, "height": 1080})  # where there is more room, it is taken
        stage.until(lambda: stage.page.locator("canvas").bounding_box()["height"] == 0.6 * 1080)
        stage.page.set_viewport_size({"width": 1280, "height": 300})  # but never less than at scale 1
        stage.until(lambda: stage.page.locator("canvas").bounding_box()["height"] == SchedulerTimeline(feed).height)


@pytest.mark.parametrize("theme", THEMES)
def test_edges_stand_out_from_the_panel_and_focus_from_a_pressed_button(theme, themes):
    with Stage(theme=theme) as stage:
        stage.show(ControlBar(stage.feed(None)))
        code = module() + "\nexport default { colours: OKABE_ITO, edgeOn, contrast, channelsOf, theme, paintedOver };"
        ratios = stage.page.evaluate("""async (code) => {
            const m = (await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })))).default;
            const t = m.theme(document.querySelector(".tv-panel")), ground = m.paintedOver(t.panel);
            return { edges: m.colours.map((colour) => m.contrast(m.paintedOver(m.edgeOn(colour, t)), ground)),
              muted: [t.panel, t.raised, t.background].map((c) =>
                m.contrast(m.paintedOver(t.muted), m.paintedOver(c))) };
        }""", code)
        assert min(ratios["edges"]) >= 3 and min(ratios["muted"]) >= 4.5
        stage.page.locator("[data-do='run']").evaluate("(n) => n.setAttribute('aria-pressed', 'true')")
        stage.page.keyboard.press("Tab")
        stage.page.locator("[data-do='run']").focus()
        outline = stage.page.locator("[data-do='run']").evaluate("""(n) => { const s = getComputedStyle(n);
            return [s.outlineStyle, s.outlineColor === s.backgroundColor, parseFloat(s.outlineOffset) > 0]; }""")
        assert outline == ["solid", False, True]
        assert "--jp-brand-color1" not in stylesheet().split(":focus-visible")[1].split("}")[0]


def test_what_is_said_last_is_said_even_if_much_was_said_before(themes):
    with Stage() as stage:
        code = module() + """\nexport default { async render({ model, el }) {
            const ui = await panel(model, el, "Talker"); window.talk = ui.say; return ui.dispose; } };"""
        panel = ControlBar(stage.feed(None))
        panel._esm = code
        stage.show(panel)
        stage.page.evaluate("() => { for (const text of ['one', 'two', 'three']) talk(text); }")
        spoken = stage.page.locator(".tv-spoken")
        assert spoken.text_content() == "one"  # no more than one in two seconds
        stage.until(lambda: spoken.text_content() == "three")
