"""The block map in a real page against the engine's pool: colours, counts, tables, tokens, kills, waste."""

import json

import pytest

from tests.browser.stage import Stage
from tinyvllm import LLM, SamplingParams
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace
from widgets.controls import Controls
from widgets.kv_block_map import KVBlockMap

LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
STORY = "Tell me a story about a fox and a lantern."


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", use_tqdm=False, num_blocks=64, max_num_seqs=16)


@pytest.fixture
def shown(llm):
    """(stage, live engine) with a map."""
    llm.reset(block_size=16, num_blocks=64)
    with LiveEngine(llm, steps_per_second=100) as live, Stage() as stage:
        feed = stage.feed(live)
        stage.show(KVBlockMap(feed))
        stage.until(lambda: data(stage)["free"] == "64")
        yield stage, live
        assert stage.errors == [] and feed.error is None and live.error is None


def data(stage, part="pool"):
    return stage.page.eval_on_selector(f"[data-part='{part}']", "(node) => ({ free: '', ...node.dataset })")


def said(stage, what):
    return stage.page.text_content(f"[data-said='{what}'] b").replace(",", "")


def pool_of(live):
    return live.llm.engine.kv_cache_manager.pool


def tell(stage, live, text=STORY, params=LONG):
    return live.chat([{"role": "user", "content": text}], params)


def assert_page_is_pool(stage, live):
    """The page, once it has drawn what the paused engine told, shows the pool and nothing else."""
    stage.until(lambda: live.state == "paused")  # a step that was begun is ended first
    pool = pool_of(live)
    held = [b for b in pool.blocks if b.ref_cnt]
    shared = {str(b.block_id): b.ref_cnt for b in held if b.ref_cnt > 1}
    findable = sum(b.block_hash is not None and not b.ref_cnt for b in pool.blocks)
    tokens = {r.request_id: r.num_computed_tokens for r in live.llm.engine.scheduler.running}
    filled = {}
    for name, ids in live.llm.engine.kv_cache_manager.req_to_block_ids.items():
        for i, block_id in enumerate(ids):
            filled[block_id] = max(filled.get(block_id, 0), min(pool.block_size, tokens[name] - i * pool.block_size))
    waste = len(held) * pool.block_size - sum(filled.values())
    want = (str(len(held)), shared, str(findable), str(pool.num_free_blocks - findable),
            f"{len(held)} of {pool.num_blocks}", str(len(shared)), str(waste))

    def drawn():
        now = data(stage)
        return (now["coloured"], json.loads(now["shared"]), now["cached"], now["free"],
                said(stage, "held"), said(stage, "shared"), said(stage, "waste"))

    try:
        stage.until(lambda: drawn() == want)
    except TimeoutError:
        assert drawn() == want
        raise
    return len(shared), findable


def pause(stage, live):
    live.pause()
    stage.until(lambda: live.state == "paused")


def centre(stage, block_id, dx=0.5, dy=0.5):
    now = data(stage)
    cell, columns = float(now["cell"]), int(now["columns"])
    return {"x": (block_id % columns + dx) * cell, "y": float(now["top"]) + (block_id // columns + dy) * cell}


def pixels(stage, *places):
    """The colours in the page at places (block, dx, dy) of blocks' cells, as #rrggbb."""
    return stage.page.eval_on_selector("[data-part='pool']", """(node, places) => {
        const ratio = node.width / node.clientWidth;
        const all = node.getContext("2d").getImageData(0, 0, node.width, node.height).data;
        return places.map(({ x, y }) => {
            const at = 4 * (Math.round(y * ratio) * node.width + Math.round(x * ratio));
            return "#" + [...all.slice(at, at + 3)].map((v) => v.toString(16).padStart(2, "0")).join("").toUpperCase();
        }); }""", [centre(stage, *place) for place in places])


def test_the_page_is_the_pool_with_sharing_preemption_and_eviction(shown):
    stage, live = shown
    seen = {"shared": 0, "findable": 0}
    live.set_speed(None)
    live.pause()
    for moment in range(8):
        if moment == 5:
            live.abort(*live.stats.running[:2])
        else:
            for _ in range(2):
                tell(stage, live, f"{STORY} {'Please. ' * (moment % 3)}")
            steps = live.stats.num_steps + 25
            live.step(25)
            stage.until(lambda steps=steps: live.stats.num_steps == steps)
        live.between_steps(lambda llm: None).result(timeout=10)
        shared, findable = assert_page_is_pool(stage, live)
        seen["shared"] += shared
        seen["findable"] += findable
    seen["preempted"] = live.stats.num_preemptions
    kinds = {event.kind for event in live.events.read(0)[0]}
    assert all(seen.values()) and "blocks_evicted" in kinds, seen
    live.stop()
    stage.until(lambda: live.stats.num_running == 0)
    assert_page_is_pool(stage, live)
    assert data(stage)["coloured"] == "0"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_cell_has_its_owner_s_colour_and_a_shared_one_both(shown, theme):
    stage, live = shown
    stage.set_theme(theme)
    live.pause()
    first = tell(stage, live)
    live.step(3)
    stage.until(lambda: live.stats.num_steps == 3)
    second = tell(stage, live)
    live.step(2)
    stage.until(lambda: live.stats.num_steps == 5)
    assert_page_is_pool(stage, live)
    colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
    tables = live.llm.engine.kv_cache_manager.req_to_block_ids
    shared = next(b for b in tables[first] if b in tables[second])
    own = next(b for b in tables[second] if b not in tables[first])
    assert int(first) < 7 and int(second) < 7  # no hatch
    upper, lower, alone = pixels(stage, (shared, 0.88, 0.4), (shared, 0.88, 0.85), (own, 0.08, 0.6))
    assert {upper, lower} == {colours[int(first)], colours[int(second)]} and alone == colours[int(second)]


def test_click_a_block_for_its_tokens_and_select_its_request(shown):
    stage, live = shown
    live.pause()
    name = tell(stage, live)
    live.step(20)
    stage.until(lambda: live.stats.num_steps == 20)
    assert_page_is_pool(stage, live)
    table = live.llm.engine.kv_cache_manager.req_to_block_ids[name]
    request = live.llm.engine.scheduler.running[0]
    stage.page.locator("[data-part='pool']").click(position=centre(stage, table[1]))
    detail = "[data-told='block']"
    stage.until(lambda: stage.page.is_visible(detail))
    assert stage.page.get_attribute(detail, "data-block") == str(table[1])
    feed = stage.panels["panel-0"].feed
    assert feed.selection["block"] == table[1] and feed.selection["request"] == name
    ids = stage.page.locator(".tv-token-id").all_text_contents()
    assert [int(i) for i in ids] == request.token_ids[16:32]
    texts = stage.page.locator(".tv-token .tv-mono").all_text_contents()
    assert texts == [(live.token_text(i).replace(" ", "␣").replace("\n", "⏎") or "∅") for i in request.token_ids[16:32]]
    assert stage.page.locator(".tv-token-at").all_text_contents() == [str(i) for i in range(16, 32)]
    stage.until(lambda: data(stage)["table"] == " ".join(map(str, table)))
    feed.select(token=2)  # chosen in another panel: its block is shown here
    stage.until(lambda: feed.selection["block"] == table[0]
                and stage.page.get_attribute(detail, "data-block") == str(table[0]))
    # And the words follow while the request grows.
    live.step(16)
    feed.select(block=live.llm.engine.kv_cache_manager.req_to_block_ids[name][-1])
    stage.until(lambda: live.stats.num_steps == 36)
    last = live.llm.engine.kv_cache_manager.req_to_block_ids[name]
    feed.select(block=last[-1])
    want = request.token_ids[16 * (len(last) - 1):request.num_computed_tokens]
    stage.until(lambda: [int(i) for i in stage.page.locator(".tv-token-id").all_text_contents()] == want)


def test_a_killed_request_s_blocks_go_back_in_the_page(shown):
    stage, live = shown
    for i in range(3):
        tell(stage, live, f"{STORY} {i}")
    stage.until(lambda: live.stats.num_running == 3 and live.stats.num_steps > 10)
    assert stage.page.is_disabled("[data-do='kill']")
    feed = stage.panels["panel-0"].feed
    victim = live.stats.running[1]
    feed.select(request=victim)
    stage.until(lambda: not stage.page.is_disabled("[data-do='kill']"))
    assert stage.page.text_content("[data-do='kill']") == f"Kill request {victim}"
    stage.page.click("[data-do='kill']")
    stage.until(lambda: live.stats.num_running == 2)
    pause(stage, live)
    assert victim not in live.llm.engine.kv_cache_manager.req_to_block_ids
    assert_page_is_pool(stage, live)
    stage.until(lambda: stage.page.is_disabled("[data-do='kill']") and data(stage)["table"] == "")


def test_keys_walk_over_blocks_and_requests(shown):
    stage, live = shown
    live.pause()
    names = [tell(stage, live, f"{STORY} {i}") for i in range(2)]
    live.step(2)
    stage.until(lambda: live.stats.num_steps == 2)
    assert_page_is_pool(stage, live)
    feed, page = stage.panels["panel-0"].feed, stage.page
    page.focus("[data-part='pool']")
    for key, block in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0),
                       ("ArrowDown", int(data(stage)["columns"]))):
        page.keyboard.press(key)
        stage.until(lambda block=block: feed.selection["block"] == block)
    page.keyboard.press("Enter")
    stage.until(lambda: page.is_visible("[data-told='block']"))
    page.keyboard.press("Escape")
    stage.until(lambda: page.is_hidden("[data-told='block']") and feed.selection["block"] is None)
    page.focus("[data-part='use']")
    feed.select(request=None)
    stage.run(0.05)
    for key, name in (("ArrowDown", names[0]), ("ArrowDown", names[1]), ("ArrowDown", names[1]), ("ArrowUp", names[0])):
        page.keyboard.press(key)
        stage.until(lambda name=name: feed.selection["request"] == name)
    page.keyboard.press("Escape")
    stage.until(lambda: feed.selection["request"] is None)


def test_a_larger_block_wastes_more_and_one_slot_a_block_nothing(shown):
    stage, live = shown
    live.set_speed(None)
    wasted = {}
    for size in (1, 16, 256):
        live.reset(block_size=size, num_blocks=1024 // size * 4, enable_prefix_caching=False)
        live.pause()
        for i in range(4):
            tell(stage, live, f"{STORY} {i}")
        live.step(30)
        stage.until(lambda: live.stats.num_steps == 30)
        assert_page_is_pool(stage, live)
        wasted[size] = int(said(stage, "waste"))
        live.stop()
        live.resume()
    assert wasted[1] == 0 < wasted[16] < wasted[256]


def test_a_recorded_run_shows_the_same_and_says_what_it_cannot(llm, tmp_path):
    llm.reset(block_size=16, num_blocks=64, enable_prefix_caching=True)
    with LiveEngine(llm) as live, Stage() as stage:
        controls = Controls.of(stage.feed(live))
        controls.use([STORY], LONG)
        controls.record()
        controls.burst(4)
        live.wait_idle()
        controls.stop_recording(str(tmp_path / "run"))
    trace = Trace.load(tmp_path / "run.jsonl")
    with ReplayEngine(trace, paused=True) as replay, Stage() as stage:
        feed = stage.feed(replay)
        stage.show(KVBlockMap(feed))
        replay.step(40)
        stage.until(lambda: data(stage)["free"] != "" and feed.state.steps and feed.state.steps[-1].step >= 40)
        stage.until(lambda: data(stage)["coloured"] == str(feed.state.num_used_blocks) != "0")
        name, request = next((n, r) for n, r in feed.state.requests.items() if r.block_ids)
        feed.select(request=name)
        stage.page.locator("[data-part='pool']").click(position=centre(stage, request.block_ids[0]))
        stage.until(lambda: stage.page.locator(".tv-token").count() == 16)
        assert "?" not in stage.page.locator(".tv-token .tv-mono").all_text_contents()
        assert stage.page.is_disabled("[data-do='kill']")
        assert "recorded run" in stage.page.get_attribute("[data-do='kill']", "title")
        assert stage.errors == []


@pytest.mark.parametrize("num_blocks, block_size", [(64, 16), (8192, 2), (5, 300)])
@pytest.mark.parametrize("width, scale, theme", [(1280, 1, "light"), (1280, 2, "dark"), (900, 2, "light")])
def test_pools_of_every_size_fit_the_page(llm, num_blocks, block_size, width, scale, theme):
    llm.reset(block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=True)
    with LiveEngine(llm, paused=True) as live, Stage(width=width, theme=theme) as stage:
        feed = stage.feed(live)
        stage.show(KVBlockMap(feed, scale=scale))
        name = live.add(STORY, LONG, "my-request-17 🦊 with a long and rather unusual name")
        live.step(4)
        stage.until(lambda: live.stats.num_steps == 4)
        feed.select(request=name)
        assert_page_is_pool(stage, live)
        now = data(stage)
        rows = -(-num_blocks // int(now["columns"]))
        assert int(now["columns"]) * float(now["cell"]) <= stage.page.eval_on_selector(
            "[data-part='pool']", "(n) => n.clientWidth")
        assert rows * float(now["cell"]) + float(now["top"]) <= 320 * scale
        wide, right = stage.page.evaluate("""() => [document.documentElement.scrollWidth, Math.max(
            ...[...document.querySelectorAll('.tv-blocks *')].map((n) => n.getBoundingClientRect().right))]""")
        assert wide <= width and right <= width and stage.errors == []


def test_a_step_paints_the_cells_that_changed_and_the_picture_is_as_if_all_were_painted(shown):
    stage, live = shown
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for i in range(5):
        tell(stage, live, f"Tell me story {i} about a fox.", params)
    stage.until(lambda: int(data(stage)["coloured"] or 0) >= 10)
    stage.until(lambda: 0 < int(data(stage)["painted"]) <= 12)  # five requests write, and some begin a new block
    live.pause()
    assert_page_is_pool(stage, live)
    pixels = "document.querySelector(\"[data-part='pool']\").toDataURL()"
    stage.run(0.5)  # words are written at once, the picture in the next animation frame
    kept = stage.page.evaluate(pixels)
    stage.set_theme("dark")  # everything is painted anew ...
    stage.until(lambda: stage.page.evaluate(pixels) != kept)
    stage.set_theme("light")  # ... and once more
    stage.until(lambda: stage.page.evaluate(pixels) == kept)
