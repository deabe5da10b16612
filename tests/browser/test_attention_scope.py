"""AttentionScope in a browser: the colours on the screen are the weights, and the arithmetic is the engine's own."""

import json

import numpy as np
import pytest

from tests.browser.stage import Stage
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from tinyvllm.kernels.attention.rows import attention_rows_numpy
from tinyvllm.probe.vectors import head_vectors, softmax_rows
from widgets.attention_scope import AttentionScope

FOX = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]
VIRIDIS = np.array([[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129],
                    [92, 200, 99], [170, 220, 50], [253, 231, 37]])


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", use_tqdm=False, max_num_seqs=8, enable_prefix_caching=False)


@pytest.fixture
def live(llm):
    with LiveEngine(llm) as engine:
        yield engine
        engine.abort()
        engine.wait_idle()


@pytest.fixture(params=["light"])
def stage(request):
    with Stage(theme=request.param, height=1000) as stage:
        yield stage
        assert stage.errors == []


def show(stage, live, **options):
    """(feed, the panel's root, its data attributes on demand)."""
    feed = stage.feed(live)
    panel_id = stage.show(AttentionScope(feed, **options))
    root = stage.page.locator(f"#{panel_id} section")
    return feed, root, lambda: root.evaluate("e => ({...e.dataset})")


def chat(stage, live, dataset, count=40, **options):
    """Run a chat to its end, and wait until all of its rows are in the page; returns the request's id."""
    request_id = live.chat(FOX, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), **options)
    whole = len(live.llm.chat_token_ids(FOX)) + count - 1
    stage.until(lambda: dataset()["request"] == request_id and int(dataset()["rows"]) == whole
                and int(dataset()["thumbnails"]) == whole)
    return request_id


def twin(live, layer, head):
    """Attention of one head by the NumPy twin of the kernel: float32 [rows, context]."""
    def compute(llm):
        runner, watch = llm.runner, llm.runner.watch
        rows, one = np.array(llm.probe.kept, np.int32), lambda i: np.array([i], np.int32)
        out = np.zeros((1, 1, len(rows), watch.context), np.float32)
        statistics = np.zeros((1, 1, len(rows), 2), np.float32)
        attention_rows_numpy(out, statistics, watch.queries, runner.kv_cache.k, np.array(watch.block_ids), one(layer),
                             one(head), rows, runner.dims.scale)
        return out[0, 0]

    return live.between_steps(compute).result(10)


def weights_of_colours(colours):
    """Weights from colours on viridis, in steps of 1/255."""
    at = np.linspace(0, 8, 256)
    table = np.stack([np.interp(at, range(9), VIRIDIS[:, i]) for i in range(3)], axis=1)
    distance = np.abs(np.array(colours)[:, None] - table[None]).sum(-1)
    assert distance.min(1).max() < 4, "a colour that is not on the scale"
    return distance.argmin(1) / 255


@pytest.mark.parametrize("stage", ["light", "dark"], indirect=True)
def test_the_row_on_the_screen_is_the_numpy_twins(stage, live):
    feed, root, dataset = show(stage, live)
    feed.select(layer=3, head=2)
    chat(stage, live, dataset)
    expected = twin(live, 3, 2)
    for row in (0, 1, 17, len(expected) - 1):
        bytes_shown = np.array(root.evaluate("(e, row) => e.attentionRow(row)", row))
        assert np.abs(bytes_shown / 255 - expected[row, :row + 1]).max() <= 0.5 / 255 + 1e-6
    stage.page.click("text=√ colours")  # now a colour's place on the scale is the weight itself
    stage.run(0.1)
    for row in (1, 17, len(expected) - 1):
        seen = weights_of_colours(root.evaluate("(e, row) => e.attentionPixels(row)", row))
        assert np.abs(seen - expected[row, :row + 1]).max() <= 2.01 / 255  # neighbours differ by one or two of 255
    assert dataset()["layer"] == "3" and dataset()["head"] == "2" and feed.error is None


def test_every_head_has_a_thumbnail_and_a_click_brings_it_into_focus(stage, live):
    feed, root, dataset = show(stage, live)
    chat(stage, live, dataset, count=8)
    thumbs = root.locator("canvas").nth(0)
    stage.until(lambda: thumbs.get_attribute("data-drawn") == "64")
    box = thumbs.bounding_box()
    step = (box["width"] - 26) / 8
    thumbs.click(position={"x": 26 + 6.5 * step, "y": 34 + 5.5 * step})
    stage.until(lambda: (dataset()["layer"], dataset()["head"]) == ("5", "6"))
    assert feed.selection["layer"] == 5 and feed.selection["head"] == 6
    stage.until(lambda: int(dataset()["rows"]) == int(dataset()["thumbnails"]))
    last = int(dataset()["rows"]) - 1
    shown = np.array(root.evaluate("(e, row) => e.attentionRow(row)", last)) / 255
    assert np.abs(shown - twin(live, 5, 6)[last, :last + 1]).max() <= 0.5 / 255 + 1e-6
    thumbs.focus()
    stage.page.keyboard.press("ArrowLeft")
    stage.page.keyboard.press("ArrowUp")
    stage.until(lambda: (feed.selection["layer"], feed.selection["head"]) == (4, 5))
    feed.select(layer=0, head=0)  # and from elsewhere
    stage.until(lambda: (dataset()["layer"], dataset()["head"]) == ("0", "0"))


def test_a_click_on_a_cell_opens_its_arithmetic(stage, live):
    feed, root, dataset = show(stage, live)
    feed.select(layer=2, head=5)
    chat(stage, live, dataset, count=8)
    canvas = root.locator("canvas").nth(1)
    stage.run(0.2)
    cell = float(canvas.get_attribute("data-cell-px"))
    canvas.click(position={"x": 92 + 4.5 * cell, "y": 74 + 20.5 * cell})
    box = root.locator(".tv-arithmetic")
    stage.until(lambda: box.get_attribute("data-cell") == "2,5,20,4")
    assert feed.selection["token"] == 20
    expected = live.between_steps(lambda llm: llm.probe.attention_cell(2, 5, 20, 4)).result(10)
    for name in ("dot", "score", "weight", "denominator", "exp"):
        assert float(box.get_attribute(f"data-{name}")) == pytest.approx(expected[name], rel=1e-5)
    assert "q · k" in box.inner_text() and "may be seen" in box.inner_text()
    # The keyboard walks, the arithmetic follows, into the future as well.
    canvas.focus()
    stage.page.keyboard.press("ArrowDown")
    stage.until(lambda: box.get_attribute("data-cell") == "2,5,21,4")
    for _ in range(18):
        stage.page.keyboard.press("ArrowRight")
    stage.until(lambda: box.get_attribute("data-cell") == "2,5,21,22")
    assert float(box.get_attribute("data-weight")) == 0 and "in the future" in box.inner_text()
    stage.page.keyboard.press("Escape")
    stage.until(lambda: feed.selection["token"] is None)
    assert box.get_attribute("data-cell") is None
    feed.select(token=7)  # from another panel
    stage.until(lambda: dataset()["cell"].startswith("7,"))
    canvas.focus()
    stage.page.keyboard.press("Enter")
    stage.until(lambda: (box.get_attribute("data-cell") or "").startswith("2,5,7,"))


def test_an_open_cell_follows_the_head_in_focus_although_rows_of_a_long_text_come_in_pieces(stage, live):
    feed, root, dataset = show(stage, live)
    name = live.add(list(range(30, 330)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    stage.until(lambda: dataset()["request"] == name and dataset()["rows"] == "303")
    root.locator("canvas").nth(1).focus()
    stage.page.keyboard.press("Enter")
    box = root.locator(".tv-arithmetic")
    stage.until(lambda: (box.get_attribute("data-cell") or "").startswith("0,0,302,"))
    stage.until(lambda: feed.selection["token"] == 302)
    for layer in (5, 2, 7):
        feed.select(layer=layer, token=250)
        stage.until(lambda now=f"{layer},0,250,": (box.get_attribute("data-cell") or "").startswith(now))



def test_what_if_is_labelled_and_is_what_the_softmax_would_be(stage, live):
    feed, root, dataset = show(stage, live)
    feed.select(layer=6, head=3)
    chat(stage, live, dataset, count=8)
    vectors = live.between_steps(lambda llm: head_vectors(llm, 6, 3)).result(10)
    for click, causal, scaled in (("text=causal mask", False, True), ("text=÷ √d", False, False),
                                  ("text=causal mask", True, False)):
        stage.page.click(click)
        wanted = f"{json.dumps(causal)},{json.dumps(scaled)},{len(vectors.positions)}"
        stage.until(lambda wanted=wanted: dataset()["whatIf"] == wanted)
        expected = softmax_rows(vectors, causal=causal, scaled=scaled)
        for row in (0, 11, len(expected) - 1):
            shown = np.array(root.evaluate("(e, row) => e.attentionRow(row)", row))
            assert len(shown) == (row + 1 if causal else len(vectors.k))
            assert np.abs(shown / 255 - expected[row, :len(shown)]).max() <= 0.5 / 255 + 1e-5
    stage.page.click("text=÷ √d")
    stage.until(lambda: dataset()["whatIf"] == "")
    shown = np.array(root.evaluate("(e, row) => e.attentionRow(row)", 11))
    assert np.abs(shown / 255 - softmax_rows(vectors)[11, :12]).max() <= 0.5 / 255 + 1e-5


def test_the_row_as_text_has_the_tokens_themselves(stage, live):
    feed, root, dataset = show(stage, live)
    request_id = chat(stage, live, dataset, count=12)
    feed.select(token=25)
    stage.until(lambda: root.locator(".tv-row-text").get_attribute("data-row") == "25")
    request = feed.state.requests[request_id]
    ids = [*request.prompt_token_ids, *request.token_ids]
    chips = root.locator(".tv-row-text span").all_text_contents()
    assert [c.replace("␣", " ").replace("⏎", "\n").replace("⇥", "\t") for c in chips] == [
        live.token_text(i) for i in ids[:26]]


def test_who_comes_late_sees_the_same_and_the_last_one_out_ends_the_watch(stage, live):
    feed, root, dataset = show(stage, live)
    chat(stage, live, dataset, count=20)
    rows = dataset()["rows"]
    late = stage.show(AttentionScope(feed))
    other = stage.page.locator(f"#{late} section")
    stage.until(lambda: other.get_attribute("data-rows") == rows)
    assert other.evaluate("e => e.attentionRow(30)") == root.evaluate("e => e.attentionRow(30)")
    stage.remove(late)
    stage.run(0.2)
    assert live.between_steps(lambda llm: llm.runner.watch is not None).result(10)
    stage.remove("panel-0")
    stage.until(lambda: live.between_steps(lambda llm: llm.runner.watch is None).result(10))


@pytest.mark.parametrize("width", [1280, 900])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_nothing_is_cut_off(live, width, scale):
    with Stage(width=width, height=1400) as stage:
        feed, root, dataset = show(stage, live, scale=scale)
        assert "Nothing to show yet" in root.inner_text()
        chat(stage, live, dataset, count=6)
        stage.run(0.3)
        assert stage.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        edge = root.bounding_box()["x"] + root.bounding_box()["width"]
        for node in root.locator("canvas, button, select").all():
            box = node.bounding_box()
            assert box["x"] + box["width"] <= edge + 1
        assert stage.errors == []


def test_odd_names_and_other_panels_requests(stage, live):
    name = '<b>my</b> "request" 🦊'
    feed, root, dataset = show(stage, live)
    live.add(list(range(30, 60)), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), request_id=name)
    stage.until(lambda: dataset()["request"] == name and dataset()["rows"] == "34")
    assert root.locator("b", has_text="my").count() == 0
    assert any(name in text for text in root.locator("select option").all_text_contents())
    feed.hub.selection = {**feed.selection, "request": "not there", "layer": 99, "head": -5, "token": 10**6}
    stage.run(0.3)
    feed.select(request=None, layer=0, head=0, token=None)
    stage.run(0.2)
    assert dataset()["request"] == name and feed.error is None


def test_a_recording_says_calmly_that_attention_was_not_recorded(stage, live):
    live.add([5, 6, 7], SamplingParams(temperature=0, max_tokens=3))
    live.wait_idle()
    with ReplayEngine(Trace(live.events.read()[0]), rate=float("inf")) as replay:
        feed, root, dataset = show(stage, replay)
        stage.until(lambda: "not recorded" in dataset()["note"])
        assert root.locator(".tv-trouble").is_hidden() and "not recorded" in root.inner_text()
