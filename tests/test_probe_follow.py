"""Following: a request is watched from its first token without its name being known; and a head's numbers by hand."""

import numpy as np
import pytest

from tinyvllm import SamplingParams
from tinyvllm.probe.errors import ProbeError
from tinyvllm.probe.follow import follow, unfollow
from tinyvllm.probe.vectors import head_vectors, softmax_rows

PROMPT = [5, 9, 17, 33, 21, 8, 3]


def params(count, **options):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)


@pytest.fixture
def llm(make_llm):
    return make_llm(enable_prefix_caching=False)


def finish(llm):
    while llm.engine.has_unfinished_requests():
        llm.engine.step()


def test_the_next_request_is_watched_from_its_first_token_whatever_its_name(llm):
    assert follow(llm) is None
    llm.engine.add_request(PROMPT, params(3), request_id="anything at all")
    finish(llm)
    assert follow(llm) == "anything at all" and llm.probe.kept == list(range(len(PROMPT) + 2))
    llm.engine.add_request(PROMPT[::-1], params(2), request_id="the next")
    llm.engine.step()
    assert llm.probe.watched == "the next" and llm.probe.kept == list(range(len(PROMPT)))
    finish(llm)


def test_it_stays_with_a_request_until_that_has_ended(llm):
    follow(llm)
    llm.engine.add_request(PROMPT, params(6), request_id="first")
    llm.engine.step()
    llm.engine.add_request(PROMPT[::-1], params(12), request_id="second")
    while llm.engine.has_request("first"):
        assert follow(llm) == "first"
        llm.engine.step()
    assert follow(llm) == "second"  # nobody begins, and this one runs
    finish(llm)


def test_a_named_request_is_kept_to_and_what_is_kept_of_it_stays(llm):
    follow(llm)
    for name in ("a", "b"):
        llm.engine.add_request(PROMPT, params(4), request_id=name)
    llm.engine.step()
    assert follow(llm) == "b"  # the newest of those that began together
    assert follow(llm, "b") == "b" and llm.probe.kept == list(range(len(PROMPT)))
    assert follow(llm, "a") == "a" and llm.probe.kept == []
    llm.engine.step()
    assert llm.probe.kept == [len(PROMPT)]
    finish(llm)
    llm.engine.add_request(PROMPT, params(2), request_id="c")
    finish(llm)
    assert llm.probe.watched == "a"  # it was named: nobody else takes its place
    assert follow(llm) == "a"  # until it is let go, and somebody begins
    llm.engine.add_request(PROMPT, params(2), request_id="d")
    finish(llm)
    assert llm.probe.watched == "d"


def test_a_watch_of_somebody_else_is_left_alone(llm):
    llm.probe.watch("theirs")
    assert follow(llm) == "theirs"
    llm.engine.add_request(PROMPT, params(2), request_id="other")
    llm.engine.step()
    assert follow(llm) == "theirs"  # still to come
    unfollow(llm)
    assert llm.probe.watched == "theirs"
    finish(llm)
    llm.probe.unwatch()
    follow(llm)
    unfollow(llm)
    assert llm.runner.watch is None


def test_one_that_is_aborted_before_its_first_step_does_not_block_the_next(llm):
    llm.engine.add_request(PROMPT, params(2), request_id="gone")
    follow(llm, "gone")
    llm.engine.abort("gone")
    llm.engine.step()
    assert follow(llm) is None
    llm.engine.add_request(PROMPT, params(2), request_id="next")
    finish(llm)
    assert llm.probe.watched == "next"


def test_tokens_are_the_same_followed_or_not(llm):
    def tokens():
        return [out.outputs[0].token_ids for out in llm.generate([PROMPT, PROMPT[::-1]], params(8))]

    plain = tokens()
    follow(llm)
    assert tokens() == plain and llm.probe.kept


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "many"])
def test_a_bad_number_of_tokens_is_refused_and_nothing_changes(llm, bad):
    follow(llm)
    watch = llm.runner.watch
    with pytest.raises(ProbeError, match="max_tokens"):
        follow(llm, None, bad)
    assert llm.runner.watch is watch


def test_vectors_give_the_weights_that_the_probe_gives(llm):
    follow(llm)
    llm.engine.add_request(PROMPT, params(20))
    finish(llm)
    dims = llm.runner.dims
    for layer in range(dims.num_layers):
        for head in range(dims.num_heads):
            vectors = head_vectors(llm, layer, head)
            q, k = vectors.q.astype(np.float64), vectors.k.astype(np.float64)
            scores = q @ k.T * dims.head_dim ** -0.5
            scores[np.arange(len(k)) > vectors.positions[:, None]] = -np.inf
            expected = np.exp(scores - scores.max(1, keepdims=True))
            expected /= expected.sum(1, keepdims=True)
            assert np.abs(softmax_rows(vectors) - expected).max() < 1e-5
            weights = llm.probe.attention(vectors.positions.tolist(), [layer], [head])[0, 0]
            assert np.abs(weights - expected).max() < 1e-5


def test_without_mask_a_row_sees_the_future_and_without_scale_it_is_sharper(llm):
    follow(llm)
    llm.engine.add_request(PROMPT, params(20))
    finish(llm)
    vectors = head_vectors(llm, 1, 2)
    real, free, raw = (softmax_rows(vectors, causal=causal, scaled=scaled)
                       for causal, scaled in ((True, True), (False, True), (True, False)))
    future = np.arange(len(vectors.k)) > vectors.positions[:, None]
    assert (real[future] == 0).all() and (free[future] > 0).all() and (raw[future] == 0).all()
    # What is left of a row without its future, taken as a whole, is the real row: the mask only takes terms away.
    kept = np.where(future, 0, free)
    assert np.allclose(kept / kept.sum(1, keepdims=True), real, atol=1e-6)
    assert np.allclose(raw.sum(1), 1, atol=1e-5) and raw.max(1).sum() > real.max(1).sum()


def test_vectors_of_nothing_say_what_to_do(llm):
    with pytest.raises(ProbeError, match="watch a request"):
        head_vectors(llm, 0, 0)
    follow(llm)
    llm.engine.add_request(PROMPT, params(2))
    finish(llm)
    with pytest.raises(ProbeError, match="layer 99"):
        head_vectors(llm, 99, 0)
    with pytest.raises(ProbeError, match="head -1"):
        head_vectors(llm, 0, -1)
