"""TokenRace in a browser: what the cards say is the engine's own, and the bars are the sampler's own."""

import numpy as np
import pytest

from tests.browser.stage import Stage
from tests.feed_stand_ins import SteppedSource
from tinyvllm import LLM, LiveEngine, SamplingParams
from tinyvllm.kernels import sampling
from tinyvllm.kernels.bf16 import bf16_to_float32, float32_to_bf16
from widgets.panel import STATIC
from widgets.token_race import TokenRace

PARAMS = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=300, ignore_eos=True)
CARDS = """() => Object.fromEntries([...document.querySelectorAll('.tv-race-card:not([hidden])')].map((card) =>
    [card.dataset.request, { text: card.querySelector('.tv-race-words').textContent, tokens: +card.dataset.tokens,
     status: card.dataset.status, parent: card.dataset.parent, selected: card.ariaSelected }]))"""
BARS = """() => [...document.querySelectorAll('.tv-race-row')].map(({ dataset }) => ({ id: +dataset.id,
    kept: dataset.kept === 'true', chosen: dataset.chosen === 'true', after: +dataset.after, before: +dataset.before,
    logit: +dataset.logit }))"""


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", use_tqdm=False, block_size=8, max_num_seqs=8)


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


def wait_for_cards(stage, feed, live):
    """Until the page shows all that the engine did."""
    live.between_steps(lambda llm: None).result(10)  # it knows of the steps
    stage.until(lambda: live.state in ("paused", "idle"))
    live.between_steps(lambda llm: None).result(10)  # the last step is over
    with feed.lock:
        feed.tick()
    stage.until(lambda: all(
        card["tokens"] == len(feed.state.requests[i].token_ids) and card["status"] != "running"
        for i, card in stage.page.evaluate(CARDS).items()))


@pytest.mark.parametrize("stage", ["light", "dark"], indirect=True)
def test_cards_say_what_the_engine_says(stage, live):
    feed = stage.feed(live)
    stage.show(TokenRace(feed))
    names = [live.add("Once upon a time", SamplingParams(temperature=0.8, seed=i, max_tokens=n, ignore_eos=True))
             for i, n in enumerate((10, 25, 40, 55))]
    names.append(live.add("<b>it</b> 😀 é", SamplingParams(temperature=2.0, seed=1, max_tokens=60), "my-request-17"))
    live.step(45)
    stage.until(lambda: len(feed.state.requests) == 5 and feed.state.steps)
    wait_for_cards(stage, feed, live)
    cards = stage.page.evaluate(CARDS)
    assert set(cards) == set(names)
    for name, card in cards.items():
        request = feed.state.requests[name]
        assert card["text"] == request.text and card["tokens"] == len(request.token_ids) > 0
        assert card["status"] == (request.status if request.finished_ns else request.spans[-1].kind)
    assert {card["status"] for card in cards.values()} >= {"length", "decode"}
    assert stage.page.locator("section").get_attribute("data-requests") == "5"
    assert "tok/s in all" in stage.page.inner_text(".tv-race-totals")


def test_nothing_yet_says_how_to_begin(stage, live):
    stage.show(TokenRace(stage.feed(live)))
    stage.run(0.2)
    assert "its text will stream here" in stage.page.inner_text(".tv-race")


def paused_with_bars(stage, live, steps=6, **traits):
    feed = stage.feed(live)
    panel = TokenRace(feed, **traits)
    stage.show(panel)
    name = live.add("Once upon a time there was a fox who", PARAMS)
    feed.select(request=name)
    live.step(steps)
    stage.until(lambda: live.state == "paused" and name in feed.state.requests
                and len(feed.state.requests[name].token_ids) == steps)
    last = feed.state.requests[name].num_tokens - 1
    stage.until(lambda: stage.page.evaluate("+document.querySelector('.tv-race-right').dataset.position") == last)
    return feed, panel, name


def kept_by_the_twin(logits, temperature, top_k, top_p, monkeypatch):
    """The ids that sample_numpy can draw: noise that favours one id beyond all others draws it, if it is kept."""
    bits = float32_to_bf16(logits)[None]
    kept = []
    for favourite in range(len(logits)):
        monkeypatch.setattr(sampling, "uniform_numpy", lambda seed, position, ids, i=favourite: np.where(
            ids == i, 0.5, 0.0))
        out = np.empty(1, np.int32)
        with np.errstate(divide="ignore", invalid="ignore"):  # noise of minus infinity for all others
            sampling.sample_numpy(out, bits, np.float32([temperature]), np.int32([top_k]), np.float32([top_p]),
                                  np.uint64([0]), np.int64([0]))
        if out[0] == favourite:
            kept.append(favourite)
    return kept


def test_paused_the_bars_are_exactly_the_last_steps_logits_and_follow_the_sliders(stage, live, monkeypatch):
    feed, panel, name = paused_with_bars(stage, live)
    logits = live.between_steps(lambda llm: llm.probe.logits(name)).result(10)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:12]
    for temperature, top_k, top_p in [(0.9, 40, 0.95), (1.5, 0, 1.0), (2.5, 0, 0.8), (3.0, 5, 1.0), (1.0, 3, 0.5)]:
        panel.temperature, panel.top_k, panel.top_p = temperature, top_k, top_p
        stage.run(0.1)
        bars = stage.page.evaluate(BARS)
        z = logits.astype(np.float64) / np.float32(temperature)
        odds = np.exp(z - z.max())
        kept = kept_by_the_twin(logits, temperature, top_k, top_p, monkeypatch)
        assert [bar["id"] for bar in bars[:12]] == order
        assert int(stage.page.get_attribute(".tv-race-right", "data-kept")) == len(kept)
        for bar in bars:
            i = bar["id"]
            assert bar["logit"] == logits[i] and bar["kept"] == (i in kept)
            assert bar["before"] == pytest.approx(odds[i] / odds.sum(), rel=1e-9)
            assert bar["after"] == pytest.approx(odds[i] / odds[kept].sum() if i in kept else 0, rel=1e-9)
        assert float(stage.page.get_attribute(".tv-race-right", "data-kept-mass")) == pytest.approx(
            odds[kept].sum() / odds.sum())
    chosen = [bar["id"] for bar in bars if bar["chosen"]]
    assert chosen == [feed.state.requests[name].token_ids[-1]]
    panel.temperature = 0.0
    stage.run(0.1)
    assert [bar["kept"] for bar in stage.page.evaluate(BARS)][:2] == [True, False]
    stage.page.click("text=as sampled")
    stage.run(0.1)
    assert (panel.temperature, panel.top_k, panel.top_p) == (None, None, None)
    assert stage.page.get_attribute(".tv-race-right", "data-temperature") == str(PARAMS.temperature)


def test_moving_a_slider_moves_the_bars_and_tells_python(stage, live):
    _, panel, _ = paused_with_bars(stage, live)
    before = stage.page.evaluate(BARS)
    slider = stage.page.locator(".tv-race-slider input").first
    slider.focus()
    for _ in range(20):
        stage.page.keyboard.press("ArrowRight")
    stage.run(0.1)
    after = stage.page.evaluate(BARS)
    assert panel.temperature == pytest.approx(1.9) and after[0]["before"] < before[0]["before"]


ADVERSARIAL = [
    np.float32([1, 1, 1, 1, 0.5, 0.5, -1, -2]),                                # ties at every border
    np.float32([3, -np.inf, 2, np.nan, 1, -np.inf, 0.0, -0.0]),                # what is never kept
    np.float32([0.0, -0.0, 0.0, -0.0, -1e-38, 1e-38, -5, 5]),                  # zeros of both signs are one number
    np.float32([-100, -100.5, -101, -300, -300, -300, -300, -300]),            # all negative
    np.float32([3e38, -3e38, 1, 2, 3, 4, 5, 6]), np.float32([80, 79.5, 79, 0, 0, 0, 0, 0]),
    np.arange(10, dtype=np.float32),                                           # all alike where it is very hot
    np.random.default_rng(0).normal(0, 3, 40).astype(np.float32),
    np.full(8, np.nan, np.float32), np.float32([np.inf, 1, 2, 3, 4, 5, 6, 7]),
]
SETTINGS = [(1.0, 0, 1.0), (0.3, 3, 1.0), (1.0, 1, 1.0), (2.0, 0, 0.9), (1.0, 0, 0.5), (0.7, 4, 0.7), (1.0, 2, 1e-6),
            (1.5, 1000, 0.99), (1e-3, 0, 0.9), (50.0, 7, 0.33),
            (1e38, 0, 0.5), (1e38, 0, 0.3), (1e38, 0, 0.7)]  # shares that are reached exactly, in float32


def test_the_pages_arithmetic_is_the_numpy_twins(stage, monkeypatch):
    """Ties, infinities, NaN, zeros of both signs: the page keeps what sample_numpy can draw, no more and no less."""
    script = (STATIC / "sampling.js").read_text(encoding="utf-8")
    for logits in ADVERSARIAL:
        keys = sampling.ordered_keys_numpy(float32_to_bf16(logits))
        rounded = bf16_to_float32(float32_to_bf16(logits))
        distinct, counts = np.unique(keys[keys >= sampling.LOWEST_KEY], return_counts=True)
        for temperature, top_k, top_p in SETTINGS:
            theirs = stage.page.evaluate("""([script, keys, counts, all, t, k, p, n]) => new Function('a', script + `;
                const d = distribution(a.keys, a.counts, a.t, a.k, a.p, a.n);
                return [d.greedy, d.numKept, a.all.map((key) => d.kept(key)), a.all.map(valueOfKey)];`)
                ({ keys, counts, all, t, k, p, n })""", [script, distinct[::-1].tolist(), counts[::-1].tolist(),
                                                         keys.tolist(), temperature, top_k, top_p, len(logits)])
            greedy, num_kept, after, values = theirs
            if np.isnan(rounded).all() or rounded[~np.isnan(rounded)].max() == np.inf:
                assert greedy
                continue
            usable = keys >= sampling.LOWEST_KEY
            assert np.array_equal(np.float32(values)[usable], rounded[usable])
            kept = kept_by_the_twin(logits, temperature, top_k, top_p, monkeypatch)
            assert [i for i, p in enumerate(after) if p > 0 or i in kept] == kept
            assert num_kept == len(kept) and sum(after) == pytest.approx(1)


def test_a_click_forks_and_the_child_shows_its_parent(stage, live):
    feed, _, name = paused_with_bars(stage, live)
    bars = stage.page.evaluate(BARS)
    place = next(i for i, bar in enumerate(bars) if not bar["chosen"])
    stage.page.locator(".tv-race-bar").nth(place).click()
    stage.until(lambda: live.stats.num_waiting == 1)
    live.step(4)
    child = f"{name}.1"
    stage.until(lambda: child in feed.state.requests and len(feed.state.requests[child].token_ids) >= 3)
    stage.until(lambda: child in stage.page.evaluate(CARDS))
    wait_for_cards(stage, feed, live)
    cards = stage.page.evaluate(CARDS)
    request = feed.state.requests[child]
    assert request.prompt_token_ids[-1] == bars[place]["id"]
    assert cards[child]["parent"] == name and cards[child]["text"] == request.text
    assert cards[name]["status"] == "decode" and cards[name]["selected"] == "true"
    assert f"↳ from {name}" in stage.page.inner_text(f"[data-request='{child}'] .tv-race-origin")


def test_force_ends_the_old_one_by_keyboard_alone(stage, live):
    feed, panel, name = paused_with_bars(stage, live, mode="force")
    stage.page.locator(f".tv-race-card[data-request='{name}']").focus()
    stage.page.keyboard.press("Enter")
    stage.page.keyboard.press("ArrowDown")
    stage.page.keyboard.press("Enter")
    stage.until(lambda: name in feed.state.requests and feed.state.requests[name].status == "abort")
    stage.until(lambda: feed.selection["request"] == f"{name}.1")
    assert feed.state.requests[f"{name}.1"].prompt_token_ids[-1] == stage.page.evaluate(BARS)[1]["id"] \
        if stage.page.evaluate(BARS) else True
    stage.page.keyboard.press("Escape")


def test_arrows_walk_and_every_request_can_be_reached(stage, live):
    feed = stage.feed(live)
    stage.show(TokenRace(feed, shown=3))
    names = [live.add("Once upon a time", PARAMS) for _ in range(9)]
    live.step(2)
    stage.until(lambda: len(feed.state.requests) == 9 and feed.state.steps)
    stage.until(lambda: stage.page.locator("section").get_attribute("data-more") == "6")
    stage.page.locator(".tv-race-card[tabindex='0']").focus()
    stage.page.keyboard.press("ArrowRight")
    stage.until(lambda: feed.selection["request"] == names[1])
    stage.page.click("text=All 9")
    stage.until(lambda: stage.page.locator(".tv-race-list option").count() == 9)
    stage.page.select_option(".tv-race-list select", names[8])
    stage.until(lambda: names[8] in stage.page.evaluate(CARDS))
    assert stage.page.evaluate(CARDS)[names[8]]["selected"] == "true"
    stage.page.keyboard.press("Escape")
    assert stage.page.locator(".tv-race-list").is_hidden()


def test_a_source_that_cannot_be_looked_into_says_so_calmly(stage):
    class Recorded(SteppedSource):
        kind = "replay"

        def between_steps(self, look, *arguments):
            return super().between_steps(lambda llm: (_ for _ in ()).throw(RuntimeError("a recorded run")))

    source = Recorded(num_blocks=64)
    stage.show(TokenRace(stage.feed(source)))
    source.engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=5), "r")
    for _ in range(3):
        source.engine.step()
    stage.until(lambda: "not recorded" in stage.page.inner_text(".tv-race-right"))
    assert stage.page.locator(".tv-race-row").count() == 0


def test_nothing_is_cut_off_at_either_scale(stage, live):
    _, panel, _ = paused_with_bars(stage, live)
    for width in (900, 1280):
        stage.page.set_viewport_size({"width": width, "height": 900})
        for scale in (1.0, 2.0):
            panel.scale = scale
            stage.run(0.15)
            assert stage.page.evaluate("document.documentElement.scrollWidth") <= width
            assert stage.page.evaluate("""() => { const box = document.querySelector('section').getBoundingClientRect();
                return [...document.querySelectorAll('.tv-race-row, .tv-race-slider, .tv-race-totals, .tv-button')]
                    .every((node) => node.getBoundingClientRect().right <= box.right + 0.5); }""")
