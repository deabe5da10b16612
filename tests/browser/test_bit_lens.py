"""BitLens in a real page: bits, values, rounding and number line are what number_formats.py says; weights change."""

import pytest

from tests.browser.stage import Stage
from tinyvllm import LLM, SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from tinyvllm.errors import TinyVLLMError
from widgets import BitLens, TensorFile
from widgets.answers import ANSWERS
from widgets.number_formats import FORMATS, parse, short_decimal, two_to

NORM = "model.norm.weight"
FOX = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def live():
    with LiveEngine(LLM("demo", use_tqdm=False)) as engine:
        yield engine


@pytest.fixture
def stage():
    with Stage() as stage:
        yield stage
        assert stage.errors == []


def row_bits(stage, name):
    """The pattern that a row's cells show, as an integer."""
    cells = stage.page.locator(f"[data-format={name}] .bl-bit")
    return int("".join(cells.all_text_contents()), 2)


def check_against_python(stage, lens):
    """Every row, the neighbours and the number line are those of the lens's own value."""
    number_format, real = FORMATS[lens.format], parse(lens.value)
    real = lens.real if real.kind == "nan" else real  # the text says nothing of the payload
    for name in lens.formats:
        shown = row_bits(stage, name)
        expected = lens.bits if name == lens.format else FORMATS[name].encode(real)
        assert shown == expected, (name, lens.value, hex(shown), hex(expected))
    near = stage.page.locator(".bl-near").evaluate("(n) => ({...n.dataset})")
    below, above = number_format.neighbours(lens.bits)
    assert (near["below"], near["above"]) == ("" if below is None else str(below), "" if above is None else str(above))
    line = stage.page.locator(".bl-line").evaluate("(n) => ({...n.dataset})")
    if real.kind == "finite" and number_format.kind(lens.bits) != "nan":
        assert two_to(int(near["ulp"])) == number_format.ulp(lens.bits) if near["ulp"] else True
        assert int(line["nearest"]) == number_format.encode(real)
        assert int(line["cut"]) == number_format.encode(real, truncate=True)
        assert int(line["ticks"]) > 2


def show(stage, **options):
    lens = BitLens(stage.feed(None), **options)
    stage.show(lens)
    stage.run(0.15)
    return lens


def enter(stage, text):
    stage.page.fill(".bl-entry .tv-input", text)
    stage.page.press(".bl-entry .tv-input", "Enter")
    stage.run(0.1)


def test_typed_numbers_and_special_values(stage):
    lens = show(stage, formats=["bf16", "fp16", "fp32", "e4m3", "e5m2"])
    for text in ("0.1", "-1/3", "65520", "1e300", "2^-133", "3e-40", "-0", "nan", "inf", "0x3F81", "464"):
        enter(stage, text)
        if text == "0x3F81":
            assert lens.bits == 0x3F81
        else:
            assert lens.value == text and lens.bits == FORMATS["bf16"].encode(parse(text))
        check_against_python(stage, lens)
    for name in ("bf16", "fp16", "e4m3"):
        number_format = FORMATS[name]
        stage.page.click(f"[data-format={name}] .bl-name")
        m = number_format.mantissa_bits
        patterns = {"0": 0, "\u22120": number_format.sign_bit, "smallest": 1, "largest subnormal": (1 << m) - 1,
                    "smallest normal": 1 << m, "1": number_format.bias << m, "largest": number_format.largest,
                    "∞": number_format.infinity, "NaN": number_format.nan}
        for button, bits in patterns.items():
            locator = stage.page.locator(f"[data-special='{button}']")
            if bits is None:
                assert locator.is_disabled()
                continue
            locator.click()
            stage.run(0.03)
            assert (lens.format, lens.bits) == (name, bits)
            check_against_python(stage, lens)


def test_what_cannot_be_read_is_refused_and_nothing_is_lost(stage):
    lens = show(stage, value=2)
    for text in ("seven", "1/0", "0x12345", "1e99999"):
        enter(stage, text)
        assert lens.value == "2"
        assert stage.page.locator(".tv-trouble").is_visible()
    assert "divides by zero" not in stage.page.inner_text(".tv-trouble")
    enter(stage, "3")
    assert lens.value == "3" and not stage.page.locator(".tv-trouble").is_visible()


def test_bits_toggle_by_mouse_and_keyboard_alone(stage):
    lens = show(stage, value=2)
    stage.page.locator("[data-format=bf16] .bl-bit").nth(0).click()
    stage.run(0.1)
    assert lens.value == "-2" and lens.bits == 0xC000
    for key in ("ArrowRight", "Space", "End", "Space", "ArrowLeft", "Enter"):
        stage.page.keyboard.press(key)
    stage.run(0.1)
    assert lens.bits == 0x8003  # the top exponent bit, the last bit, the one before it
    check_against_python(stage, lens)
    for key in ("Home", "ArrowDown", "ArrowDown", "Space"):  # the sign of the float32 row
        stage.page.keyboard.press(key)
    stage.run(0.1)
    assert lens.format == "fp32" and not parse(lens.value).negative
    assert row_bits(stage, "bf16") == 0x0003
    assert stage.page.evaluate("document.activeElement.dataset.place") == "31"


def test_the_number_line_is_walked_and_zoomed(stage):
    lens = show(stage, value="0.1", format="fp16")
    line = stage.page.locator(".bl-line")
    line.focus()
    for key, bits in (("ArrowRight", 0x2E67), ("ArrowLeft", 0x2E66), ("ArrowLeft", 0x2E65)):
        stage.page.keyboard.press(key)
        stage.run(0.05)
        assert lens.bits == bits and lens.value == short_decimal(FORMATS["fp16"].decode(bits).fraction, 20)
    stage.page.keyboard.press("-")
    stage.run(0.1)
    assert int(line.get_attribute("data-ticks")) == 17
    assert int(line.get_attribute("data-first")) == 0x2E65 - 8
    box = line.bounding_box()
    line.click(position={"x": box["width"] - 5, "y": box["height"] / 2})
    stage.run(0.1)
    assert lens.bits == 0x2E65 + 8
    enter(stage, "0")
    line.focus()
    stage.page.keyboard.press("ArrowLeft")
    stage.run(0.05)
    assert lens.bits == 0x8001  # below zero is the smallest negative number


def test_the_notebook_and_the_page_share_one_number_and_a_reload_keeps_it(stage):
    lens = show(stage)
    lens.value = "2^-24"
    stage.run(0.1)
    check_against_python(stage, lens)
    assert stage.page.input_value(".bl-entry .tv-input") == "2^-24"
    lens.format = "e5m2"
    lens.bits = 0x7D  # a signalling NaN
    stage.run(0.1)
    assert row_bits(stage, "e5m2") == 0x7D and "signalling" in stage.page.inner_text("[data-format=e5m2]")
    stage.remove("panel-0")
    stage.show(lens)
    stage.run(0.1)
    assert row_bits(stage, "e5m2") == 0x7D and lens.bits == 0x7D


@pytest.mark.parametrize("theme, width, scale", [("light", 1280, 1.0), ("dark", 1280, 2.0), ("dark", 900, 1.0),
                                                 ("light", 900, 2.0)])
def test_nothing_is_cut_off(theme, width, scale):
    with Stage(width=width, theme=theme) as stage:
        show(stage, value="-3e-40", scale=scale, formats=["bf16", "fp16", "fp32", "e4m3", "e5m2"])
        over = stage.page.evaluate("""() => [...document.querySelectorAll('.tv-panel *')].filter((n) =>
            n.getBoundingClientRect().width && !n.closest('.tv-spoken') &&
            n.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map((n) => n.className)""")
        assert over == [] and stage.errors == []


def test_a_live_weight_is_opened_written_generated_and_restored(stage, live):
    feed = stage.feed(live)
    lens = BitLens(feed, prompt=FOX, max_tokens=40)
    stage.show(lens)
    page, loaded = stage.page, probe(live, lambda p: p.weight(NORM))
    feed.inspect("weight", name=NORM, row=9)
    line = page.locator(".bl-address")
    stage.until(lambda: line.get_attribute("data-words") == "norm.weight [9]")
    assert lens.bits == loaded[9] == int(line.get_attribute("data-bits"))
    assert page.locator("text=write into the running model").is_disabled()

    page.locator("[data-format=bf16] .bl-bit").nth(2).click()  # an exponent bit: a huge change
    page.click("text=write into the running model")
    patch = page.locator(".bl-patch")
    stage.until(lambda: patch.get_attribute("data-patches") == "1" and patch.get_attribute("data-busy") == "")
    assert probe(live, lambda p: p.weight(NORM, 9).item()) == lens.bits == loaded[9] ^ 0x2000
    page.click("text=generate again")
    texts = page.locator(".bl-texts")
    stage.until(lambda: texts.get_attribute("data-after"))
    before, after = texts.get_attribute("data-before"), texts.get_attribute("data-after")
    assert before != after and before.startswith(page.locator(".bl-text").nth(0).inner_text().split("\n")[1][:20])

    page.click("button:text-is('restore')")
    stage.until(lambda: patch.get_attribute("data-patches") == "0" and patch.get_attribute("data-busy") == "")
    assert (probe(live, lambda p: p.weight(NORM)) == loaded).all() and lens.bits == loaded[9]
    direct = live.llm.chat_token_ids([{"role": "user", "content": FOX}])
    live.add({"prompt_token_ids": direct}, SamplingParams(temperature=0, max_tokens=40), "direct")
    live.wait_idle()
    stage.until(lambda: "direct" in feed.state.requests and feed.state.requests["direct"].finished_ns)
    assert feed.state.requests["direct"].text == before


def test_whatever_is_clicked_last_is_shown_and_a_dead_address_is_told(stage, live):
    feed = stage.feed(live)
    lens = BitLens(feed)
    stage.show(lens)
    stage.page.evaluate("(a) => models['hub-0'].tinyvllmClient.inspect(a)",
                        {"kind": "weight", "name": NORM, "row": 3, "column": None})
    line = stage.page.locator(".bl-address")
    stage.until(lambda: line.get_attribute("data-words") == "norm.weight [3]")
    assert lens.bits == probe(live, lambda p: p.weight(NORM, 3).item())
    stage.run(0.01)
    feed.inspect("weight", name="model.no.such", row=0, column=0)
    stage.until(lambda: stage.page.locator(".tv-trouble").is_visible())
    assert "no.such" in stage.page.inner_text(".tv-trouble")
    stage.run(0.01)
    feed.inspect("weight", name=NORM, row=4)
    stage.until(lambda: line.get_attribute("data-words") == "norm.weight [4]")
    enter(stage, "0.5")  # typed over the weight: what would be written
    assert lens.bits == 0x3F00 and not stage.page.locator("text=write into the running model").is_disabled()
    stage.page.click("text=let go")
    stage.run(0.1)
    assert line.inner_text() == "" and not stage.page.locator(".bl-patch").is_visible() and lens.value == "0.5"


def test_the_lens_follows_a_weight_that_somebody_else_changes(stage, live):
    feed = stage.feed(live)
    lens = BitLens(feed)
    stage.show(lens)
    feed.inspect("weight", name=NORM, row=5)
    stage.until(lambda: stage.page.locator(".bl-address").get_attribute("data-words") == "norm.weight [5]")
    loaded = lens.bits
    probe(live, lambda p: p.set_weight(NORM, 5, None, 0x4080))
    live.add("Once", SamplingParams(temperature=0, max_tokens=3))  # a step goes by
    stage.until(lambda: lens.bits == 0x4080)
    assert f"loaded as {loaded:#06X}".replace("0X", "0x") in stage.page.inner_text(".bl-address")
    probe(live, lambda p: p.restore())
    live.add("Once", SamplingParams(temperature=0, max_tokens=3))
    stage.until(lambda: lens.bits == loaded)


def test_a_recorded_run_refuses_calmly(stage, live):
    live.add("Once", SamplingParams(temperature=0, max_tokens=3))
    live.wait_idle()
    live.tell_again()
    live.wait_idle()
    events = live.events.read()[0]
    first = max(i for i, event in enumerate(events) if event.kind == "engine_config")
    with ReplayEngine(Trace(events[first:]), rate=float("inf")) as replay:
        refuses_calmly(stage, stage.feed(replay))


def refuses_calmly(stage, feed):
    lens = BitLens(feed, bits=0x3F80)
    stage.show(lens)
    feed.inspect("weight", name=NORM, row=3)
    stage.until(lambda: stage.page.locator(".tv-trouble").is_visible())
    assert "no model in it to look into" in stage.page.inner_text(".tv-trouble") and lens.bits == 0x3F80
    stage.run(0.01)
    feed.inspect("weight", name=NORM, row=3, format="bf16", bits=0x4000, file="model.safetensors", offset=8)
    stage.until(lambda: stage.page.locator(".bl-address").get_attribute("data-source") == "file")
    assert lens.bits == 0x4000 and "no model in it" in stage.page.inner_text(".bl-address")
    assert not stage.page.locator(".bl-patch").is_visible()
    with pytest.raises(TinyVLLMError, match="recorded run cannot generate"):
        ANSWERS["generate_again"](feed, prompt="x")
    with pytest.raises(TinyVLLMError, match="recorded run has no model file"):
        TensorFile(feed)


def probe(live, function):
    return live.between_steps(lambda llm: function(llm.probe)).result(20)
