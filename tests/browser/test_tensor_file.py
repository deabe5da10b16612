"""TensorFile in a real page: what it shows is what stands in the file at that offset, as read here by hand."""

import json
import struct

import numpy as np
import pytest

from tests.browser.stage import Stage
from tests.model_files import write_tiny_model
from tinyvllm import LLM
from tinyvllm.engine.live import LiveEngine
from tinyvllm.loader.resolve import demo_model_folder
from widgets import BitLens, TensorFile

DATA = (demo_model_folder() / "model.safetensors").read_bytes()
START = 8 + struct.unpack("<Q", DATA[:8])[0]
HEADER = json.loads(DATA[8:START])
Q_PROJ = "model.layers.3.self_attn.q_proj.weight"


@pytest.fixture
def stage():
    with Stage(height=1300) as stage:
        yield stage
        assert stage.errors == []


def place(name):
    begin, end = HEADER[name]["data_offsets"]
    return START + begin, START + end


def matrix(name):
    """The tensor's bits, cut out of the file by hand."""
    begin, end = place(name)
    return np.frombuffer(DATA[begin:end], "<u2").reshape(HEADER[name]["shape"])


def show(stage, source=None, **options):
    panel = TensorFile(source or stage.feed(None), **options)
    panel_id = stage.show(panel)
    stage.until(lambda: stage.page.locator(f"#{panel_id} .tf-facts").inner_text()
                or stage.page.locator(f"#{panel_id} .tv-trouble").is_visible())
    stage.run(0.15)
    return panel


def values(stage):
    """What the value buttons show: [{offset, hex, bits, row, column}]."""
    return stage.page.locator(".tf-value").evaluate_all("(nodes) => nodes.map((n) => ({...n.dataset}))")


def data(stage, selector):
    return stage.page.locator(selector).evaluate("(n) => ({...n.dataset})")


def check_values(stage, name):
    shown, bits = values(stage), np.atleast_2d(matrix(name))
    assert shown
    for value in shown:
        offset, row, column = int(value["offset"]), int(value["row"]), int(value["column"])
        assert offset == place(name)[0] + 2 * (row * bits.shape[1] + column)
        assert bytes.fromhex(value["hex"]) == DATA[offset:offset + 2]
        assert int(value["bits"]) == bits[row, column]
    return shown


def test_the_parts_are_the_file_s_and_thin_ones_are_told(stage):
    panel = show(stage)
    names = stage.page.locator(".tv-tools select >> nth=1").evaluate("(s) => [...s.options].map((o) => o.text)")
    in_file = sorted((n for n in HEADER if n != "__metadata__"), key=lambda n: place(n))
    assert names == ["header length", "JSON header", *in_file]
    assert data(stage, ".tf-facts") == {"name": "header length", "begin": "0", "end": "8"}
    raw = stage.page.locator(".tf-values [data-hex]").get_attribute("data-hex")
    assert bytes.fromhex(raw) == DATA[:8] and f"{START - 8:,}" in stage.page.inner_text(".tf-values")
    width = stage.page.locator(".tf-overview").evaluate("(n) => n.clientWidth")
    edges = [(0, 8), (8, START), *map(place, in_file)]
    thin = sum((end - begin) / len(DATA) * width < 3 for begin, end in edges)
    assert data(stage, ".tf-overview") == {"parts": str(len(edges)), "widened": str(thin)} and thin > 10
    assert f"{thin} of its {len(edges)} parts" in stage.page.inner_text(".tf-note")
    assert panel.tensor == "" and panel.file == "model.safetensors"


def test_from_the_ruler_to_the_bits(stage):
    """Click a tensor in the ruler, an element in its heat map, a value: BitLens has the bits of the file."""
    feed = stage.feed(None)
    lens = BitLens(feed)
    panel = show(stage, feed)
    stage.show(lens)
    ruler, (begin, end) = stage.page.locator(".tf-detail"), place(Q_PROJ)
    box = ruler.bounding_box()
    ruler.click(position={"x": (begin + end) / 2 / len(DATA) * box["width"], "y": 35})
    stage.until(lambda: panel.tensor == Q_PROJ)
    heat = stage.page.locator(".tf-heat")
    stage.until(lambda: heat.get_attribute("data-cells"))
    box = heat.bounding_box()
    heat.click(position={"x": box["width"] * 0.3, "y": box["height"] * 0.7})
    stage.until(lambda: panel.row > 0 and values(stage) and int(values(stage)[0]["row"]) == panel.row)
    # The element that the cell shows is the largest of its rectangle.
    floats = (matrix(Q_PROJ).astype(np.uint32) << 16).view(np.float32)
    tall, wide = (-(-256 // int(heat.get_attribute(f"data-{axis}"))) for axis in ("rows", "columns"))
    top, left = panel.row // tall * tall, panel.column // wide * wide
    assert abs(floats[panel.row, panel.column]) == np.abs(floats[top:top + tall, left:left + wide]).max()
    assert abs(panel.column - 0.3 * 256) < 3 and abs(panel.row - 0.7 * 256) < 5
    shown = check_values(stage, Q_PROJ)
    assert any(int(v["column"]) == panel.column for v in shown)

    stage.page.locator(".tf-value").nth(2).click()
    chosen = shown[2]
    stage.until(lambda: lens.bits == int(chosen["bits"]) and lens.format == "bf16")
    line = stage.page.locator(".bl-address")
    stage.until(lambda: line.get_attribute("data-source") == "file")
    assert f"{int(chosen['offset']):,}" in line.inner_text()
    assert (panel.row, panel.column) == (int(chosen["row"]), int(chosen["column"]))


def test_the_bits_are_also_those_of_the_running_model(stage):
    with LiveEngine(LLM("demo", use_tqdm=False)) as live:
        feed = stage.feed(live)
        lens = BitLens(feed)
        panel = show(stage, feed)
        stage.show(lens)
        line = stage.page.locator(".bl-address")
        for name, row, column in ((Q_PROJ, 12, 40), ("model.norm.weight", 0, 200),
                                  ("model.embed_tokens.weight", 2047, 0)):
            panel.select(name, row, column)
            stage.until(lambda name=name: data(stage, ".tf-facts")["name"] == name and values(stage)
                        and any(v["column"] == str(panel.column) and v["row"] == str(panel.row) for v in values(stage)))
            check_values(stage, name)
            stage.page.locator(f".tf-value[data-column='{column}']").click()
            words = f"{name.removeprefix('model.')} [{f'{row}, {column}' if matrix(name).ndim == 2 else column}]"
            stage.until(lambda words=words: line.get_attribute("data-words") == words)
            assert line.get_attribute("data-source") == "model"
            running = live.between_steps(lambda llm, n=name, r=row, c=column: llm.probe.weight(n).reshape(
                -1, HEADER[n]["shape"][-1])[r, c].item()).result(10)
            assert lens.bits == running == np.atleast_2d(matrix(name))[row, column]
        live_layer = feed.selection["layer"]
        assert live_layer == 3  # the layer of q_proj, told to the other panels
        panel.select(Q_PROJ, 5, 6)
        stage.run(0.1)
        feed.select(layer=6)
        stage.until(lambda: panel.tensor == Q_PROJ.replace(".3.", ".6."))


def test_keyboard_alone_reaches_every_byte(stage):
    panel = show(stage)
    stage.page.locator(".tf-detail").focus()
    for _ in range(3):
        stage.page.keyboard.press("ArrowRight")
    stage.run(0.2)
    assert panel.tensor == "model.layers.0.input_layernorm.weight"
    stage.page.keyboard.press("Enter")  # zooms in, and goes on to the heat map
    stage.run(0.2)
    shown = data(stage, ".tf-detail")
    begin, end = place(panel.tensor)
    assert int(shown["from"]) < begin and end < int(shown["to"]) < end + 200
    assert stage.page.evaluate("document.activeElement.classList.contains('tf-heat')")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        stage.page.keyboard.press(key)
    stage.run(0.2)
    assert (panel.row, panel.column) == (0, 2)
    stage.page.keyboard.press("Enter")
    stage.until(lambda: panel.hub.inspected.get("row") == 2)
    assert panel.hub.inspected["bits"] == matrix(panel.tensor)[2] and panel.hub.inspected["column"] is None
    stage.page.locator(".tf-detail").focus()
    for _ in range(5):
        stage.page.keyboard.press("+")
    stage.until(lambda: data(stage, ".tf-detail").get("bytes"))
    shown = data(stage, ".tf-detail")
    raw = bytes.fromhex(shown["bytes"])
    assert len(raw) > 15 and raw == DATA[int(shown["first"]):int(shown["first"]) + len(raw)]


def test_zooming_the_heat_map_shows_single_elements(stage):
    panel = show(stage, tensor="model.embed_tokens.weight", row=1000, column=100)
    heat = stage.page.locator(".tf-heat")
    stage.until(lambda: heat.get_attribute("data-cells"))
    assert "each cell the largest of" in stage.page.inner_text(".tf-legend")
    heat.focus()
    for _ in range(6):
        stage.page.keyboard.press("+")
        stage.run(0.1)
    stage.until(lambda: heat.get_attribute("data-window") != "0,2048,0,256")
    r0, r1, c0, c1 = map(int, heat.get_attribute("data-window").split(","))
    assert r0 <= 1000 < r1 and c0 <= 100 < c1 and (r1 - r0) * (c1 - c0) == int(heat.get_attribute("data-cells"))
    stage.page.keyboard.press("ArrowRight")
    stage.run(0.2)
    assert (panel.row, panel.column) == (1000, 101)
    check_values(stage, panel.tensor)


def test_the_header_marks_the_selected_tensor(stage):
    show(stage, tensor=Q_PROJ)
    lines = stage.page.locator(".tf-json div")
    entry = stage.page.locator(".tf-json [aria-current=true]")
    assert entry.count() == 1
    name, value = json.loads("[" + entry.inner_text().rstrip(",").replace('": ', '", ', 1) + "]")
    assert (name, value) == (Q_PROJ, HEADER[Q_PROJ])
    assert lines.count() == len(HEADER) + 2
    lines.nth(2).click()
    stage.run(0.2)
    assert data(stage, ".tf-facts")["name"] == list(HEADER)[1]


def test_a_damaged_file_and_several_files(stage, tmp_path):
    bad = tmp_path / "cut.safetensors"
    bad.write_bytes(DATA[:200_000])
    feed = stage.feed(None)
    show(stage, feed, path=bad)
    trouble = stage.page.locator("#panel-0 .tv-trouble")
    assert "cut.safetensors: the file is truncated" in trouble.inner_text()
    stage.remove("panel-0")
    panel = show(stage, feed, path=write_tiny_model(tmp_path / "model", shards=2, dtype="float32"))
    second = panel.files.folder_and_names()[1][1]
    stage.page.select_option(".tv-tools select >> nth=0", second)
    stage.until(lambda: panel.file == second and stage.page.locator(".tv-panel").get_attribute("data-file") == second)
    file = panel.files.open(second)
    last = list(file)[-1]
    panel.select(last.name, 0, 1)
    stage.until(lambda: data(stage, ".tf-facts")["name"] == last.name and len(values(stage)) > 2)
    for value in values(stage):  # four bytes each
        offset = int(value["offset"])
        assert bytes.fromhex(value["hex"]) == (file.path.read_bytes())[offset:offset + 4]


@pytest.mark.parametrize("theme, width, scale", [("light", 900, 2.0), ("dark", 1280, 2.0), ("dark", 900, 1.0)])
def test_nothing_is_cut_off(theme, width, scale):
    with Stage(width=width, theme=theme) as stage:
        show(stage, scale=scale, tensor=Q_PROJ)
        over = stage.page.evaluate("""() => [...document.querySelectorAll('.tv-panel *')].filter((n) =>
            n.getBoundingClientRect().width && !n.closest('.tv-spoken') &&
            n.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((n) => n.className)""")
        assert over == [] and stage.errors == []
