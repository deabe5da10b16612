"""TokenTrail in a browser: typing re-tokenises, merges step to the library's ids, slots are the engine's own."""

import json

import pytest

from tests.browser.stage import Stage
from tests.feed_stand_ins import SteppedSource
from tinyvllm import LLM, LiveEngine, SamplingParams
from widgets.token_trail import TokenTrail

TOKENS = """() => [...document.querySelectorAll('.tv-trail-token')].map((node) => ({ id: +node.dataset.id,
    at: +node.dataset.at, text: node.firstChild.textContent, special: 'special' in node.dataset,
    split: 'split' in node.dataset, pending: 'pending' in node.dataset, output: 'output' in node.dataset,
    selected: node.ariaSelected === 'true' }))"""
MERGES, PATH = ".tv-trail-half >> nth=0", ".tv-trail-half >> nth=1"


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", use_tqdm=False, block_size=8, max_num_batched_tokens=64)


@pytest.fixture
def live(llm):
    engine = LiveEngine(llm, paused=True)
    yield engine
    engine.abort()
    engine.resume()
    engine.wait_idle()
    engine.close()


@pytest.fixture(params=["light"])
def stage(request):
    with Stage(theme=request.param) as stage:
        yield stage
        assert stage.errors == []


def ids_of(stage):
    return [token["id"] for token in stage.page.evaluate(TOKENS)]


def merged(stage, name):
    return stage.page.get_attribute(MERGES, f"data-{name}")


@pytest.mark.parametrize("stage", ["light", "dark"], indirect=True)
def test_typing_cuts_anew_and_the_template_adds_its_marks(stage, live, llm):
    panel = TokenTrail(stage.feed(live), text="The fox")
    stage.show(panel)
    stage.until(lambda: ids_of(stage) == llm.tokenizer.encode_prompt("The fox"))
    stage.page.fill("textarea", "naïve 😀 <b>lantern</b>")
    stage.until(lambda: ids_of(stage) == llm.tokenizer.encode_prompt("naïve 😀 <b>lantern</b>"))
    stage.until(lambda: panel.text == "naïve 😀 <b>lantern</b>")
    stage.page.click("text=With chat template")
    expected = llm.chat_token_ids([{"role": "user", "content": panel.text}])
    stage.until(lambda: ids_of(stage) == expected)
    assert panel.mode == "chat"
    tokens = stage.page.evaluate(TOKENS)
    assert [token["special"] for token in tokens] == [i in llm.tokenizer.special_ids for i in expected]
    assert [token["split"] for token in tokens] == [
        b"\xef\xbf\xbd" in llm.tokenizer.id_to_bytes(i).decode("utf-8", "replace").encode() for i in expected]
    assert sum(token["split"] for token in tokens) == 6  # ï is two tokens, 😀 four
    stage.page.fill("textarea", "")
    stage.until(lambda: ids_of(stage) == llm.chat_token_ids([{"role": "user", "content": ""}]))


def test_merges_step_from_bytes_to_the_librarys_ids(stage, live, llm):
    stage.show(TokenTrail(stage.feed(live), text="a lantern"))
    stage.until(lambda: len(ids_of(stage)) == 3)
    stage.page.click(".tv-trail-token >> nth=2")
    stage.until(lambda: merged(stage, "ids") == "[2007]")
    steps, spelling = llm.tokenizer.bpe_steps, "Ġlantern"
    stage.page.click("text=|◀")
    for count, merge in enumerate(steps.merges(spelling)):
        assert json.loads(merged(stage, "symbols")) == steps.symbols(spelling, count)
        joining = stage.page.locator("[data-joins='true'] small").all_inner_texts()
        assert joining == [merge.left, merge.right]
        assert f"rank {merge.rank:,} of 1,784" in stage.page.inner_text(MERGES)
        stage.page.click("button[title='next merge']")
    assert json.loads(merged(stage, "symbols")) == ["Ġlantern"] and merged(stage, "ids") == "[2007]"
    stage.page.locator("[aria-label='merges done']").focus()
    stage.page.keyboard.press("ArrowLeft")
    assert json.loads(merged(stage, "symbols")) == steps.symbols(spelling, 6)
    stage.page.click(".tv-trail-merges li >> nth=1")
    assert merged(stage, "step") == "2"


def test_a_split_character_is_explained(stage, live):
    stage.show(TokenTrail(stage.feed(live), text="an 😀!"))
    stage.until(lambda: stage.page.locator("[data-split]").count() == 4)
    stage.page.click("[data-split] >> nth=1")
    stage.until(lambda: "4 tokens together, F0 9F 98 80, are “😀”" in stage.page.inner_text(PATH))
    assert "U+FFFD (\ufffd)" in stage.page.inner_text(PATH)


def test_from_the_id_to_the_row_and_its_bits(stage, live, llm):
    feed = stage.feed(live)
    stage.show(TokenTrail(feed, text="a lantern"))
    stage.until(lambda: len(ids_of(stage)) == 3)
    stage.page.click(".tv-trail-token >> nth=2")
    stage.until(lambda: stage.page.get_attribute(PATH, "data-row") == "2007")
    bits = live.between_steps(lambda llm: llm.probe.weight(
        "model.embed_tokens.weight", rows=slice(2007, 2008), columns=slice(0, 8))).result(10).reshape(-1).tolist()
    shown = stage.page.locator(".tv-trail-number")
    assert [int(shown.nth(i).get_attribute("data-bits")) for i in range(8)] == bits
    assert shown.nth(0).inner_text().split("\n")[1].replace(" ", "") == f"{bits[0]:016b}"
    shown.nth(3).click()
    stage.until(lambda: feed.hub.inspected)
    assert {k: feed.hub.inspected[k] for k in ("kind", "name", "row", "column")} == {
        "kind": "weight", "name": "model.embed_tokens.weight", "row": 2007, "column": 3}


def test_the_slot_is_where_the_engine_keeps_the_token(stage, live, llm):
    feed = stage.feed(live)
    stage.show(TokenTrail(feed, mode="request"))
    stage.until(lambda: "No request is selected" in stage.page.inner_text(".tv-body"))
    name = live.add("Once upon a time there was a fox who lived 😀 alone", SamplingParams(
        temperature=0.9, seed=2, max_tokens=50, ignore_eos=True))
    feed.select(request=name, token=20)
    live.step(12)
    stage.until(lambda: name in feed.state.requests and len(feed.state.requests[name].token_ids) == 12)
    request = feed.state.requests[name]
    expected = request.prompt_token_ids + request.token_ids
    stage.until(lambda: ids_of(stage) == expected)
    tokens = stage.page.evaluate(TOKENS)
    assert [token["pending"] for token in tokens] == [at >= request.num_computed_tokens for at in range(len(tokens))]
    assert [token["output"] for token in tokens] == [at >= request.num_prompt_tokens for at in range(len(tokens))]
    assert tokens[-1]["pending"] and [token["at"] for token in tokens if token["selected"]] == [20]
    blocks = live.between_steps(
        lambda llm: list(llm.engine.kv_cache_manager.block_ids(llm.engine.scheduler.running[0]))).result(10)
    for at in (0, 7, 8, len(tokens) - 2):
        stage.page.click(f"[data-at='{at}']")
        stage.until(lambda at=at: feed.selection["token"] == at)
        assert stage.page.get_attribute(PATH, "data-block") == str(blocks[at // 8])
        assert stage.page.get_attribute(PATH, "data-offset") == str(at % 8)
    stage.page.click("button[title='select this block in every panel']")
    stage.until(lambda: feed.selection["block"] == blocks[(len(tokens) - 2) // 8])
    stage.page.keyboard.press("Escape")
    # The same text as a prompt has the same slots; another text has none, and it says why.
    stage.page.click("text=Raw text")
    stage.page.fill("textarea", "Once upon a time there was a wolf")
    stage.until(lambda: len(ids_of(stage)) == len(llm.tokenizer.encode_prompt("Once upon a time there was a wolf")))
    stage.page.click("[data-at='4']")
    assert stage.page.get_attribute(PATH, "data-block") == str(blocks[0])
    stage.page.locator(".tv-trail-token").last.click()
    assert "begins with other tokens" in stage.page.inner_text(PATH)
    live.abort(name)
    stage.until(lambda: feed.state.requests[name].status == "abort")
    stage.page.click("text=Selected request")
    stage.until(lambda: "holds no blocks (abort)" in stage.page.inner_text(PATH))


def follow_a_request(stage, live, max_tokens, speed):
    """(feed, request) after a panel has followed all of its tokens."""
    feed = stage.feed(live)
    stage.show(TokenTrail(feed, mode="request"))
    name = live.add("Once upon a time", SamplingParams(temperature=0.9, seed=2, max_tokens=max_tokens, ignore_eos=True))
    feed.select(request=name)
    live.set_speed(speed)
    live.resume()
    stage.until(lambda: name in feed.state.requests and feed.state.requests[name].status == "length")
    return feed, feed.state.requests[name]


def selected(stage):
    """Positions of the tokens that are shown as selected."""
    return [token["at"] for token in stage.page.evaluate(TOKENS) if token["selected"]]


def test_tokens_are_followed_as_they_come_and_arrows_walk(stage, live):
    feed, request = follow_a_request(stage, live, max_tokens=40, speed=100)
    stage.until(lambda: ids_of(stage) == request.prompt_token_ids + request.token_ids)
    last = request.num_tokens - 1
    stage.until(lambda: selected(stage) == [last])
    stage.page.locator("[aria-selected='true']").focus()
    stage.page.keyboard.press("ArrowLeft")
    stage.until(lambda: feed.selection["token"] == last - 1)
    stage.page.keyboard.press("Enter")
    stage.page.keyboard.press("Home")
    feed.select(token=2)
    stage.until(lambda: selected(stage) == [2])


def test_the_newest_token_is_chosen_though_it_is_drawn_late(stage, live):
    """Five times a second it is chosen; on a slow machine that once came before it was drawn, and then never again."""
    stage.page.evaluate("""() => {
        const real = window.requestAnimationFrame.bind(window);
        window.requestAnimationFrame = (draw) => setTimeout(() => real(draw), 450);
    }""")
    _, request = follow_a_request(stage, live, max_tokens=30, speed=20)
    last = request.num_tokens - 1
    stage.until(lambda: selected(stage) == [last], timeout=15)


def test_without_a_tokenizer_the_request_is_still_shown(stage):
    source = SteppedSource(num_blocks=64, block_size=4)
    source.kind = "replay"
    feed = stage.feed(source)
    panel = TokenTrail(feed)
    stage.show(panel)
    stage.until(lambda: "there is no tokenizer behind this panel" in stage.page.inner_text(".tv-body"))
    source.engine.add_request([1, 2, 3, 4, 5], SamplingParams(temperature=0, max_tokens=4), "a")
    feed.select(request="a")
    panel.mode = "request"
    for _ in range(3):
        source.engine.step()
    stage.until(lambda: len(ids_of(stage)) == 8)
    assert ids_of(stage) == [1, 2, 3, 4, 5, *feed.state.requests["a"].token_ids]
    stage.until(lambda: "not recorded" in stage.page.inner_text(PATH))
    assert stage.page.evaluate(TOKENS)[0]["text"] == "<1>"


def test_nothing_is_cut_off_at_either_scale(stage, live):
    panel = TokenTrail(stage.feed(live), text="Tell me a story. 😀 " + "x" * 80, mode="chat")
    stage.show(panel)
    for width in (900, 1280):
        stage.page.set_viewport_size({"width": width, "height": 900})
        for scale in (1.0, 2.0):
            panel.scale = scale
            stage.run(0.15)
            assert stage.page.evaluate("document.documentElement.scrollWidth") <= width
            assert stage.page.evaluate("""() => { const box = document.querySelector('section').getBoundingClientRect();
                return [...document.querySelectorAll('.tv-trail-token, .tv-trail-number, .tv-button, textarea')]
                    .every((node) => node.getBoundingClientRect().right <= box.right + 0.5); }""")
