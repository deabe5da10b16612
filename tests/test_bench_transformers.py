"""transformers as a peer: both of its ways give the same tokens, and every way gives a figure a round."""

import pytest

from tests.bench_stand_ins import TINY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tinyvllm.bench.transformers_peer import TransformersPeer, decode  # noqa: E402


def test_with_a_cache_of_fixed_size_it_says_the_same_as_with_a_growing_one():
    peer = TransformersPeer(TINY, "cpu")
    for name, parameter in peer.model.named_parameters():  # with weights so small every token would follow itself
        parameter.mul_(1 if "norm" in name else 10)
    prompts, cache = peer.prompts(3, 7), peer.growing_cache()
    found = [peer.step(prompts, cache)]
    for _ in range(8):
        found.append(peer.step(found[-1], cache))
    expected, fixed = torch.cat(found, dim=1), peer.fixed_cache(7 + 9)
    for _ in range(2):  # the second time in the same cache
        tokens, rate = peer.fixed_run(prompts, 9, fixed, peer.step)
        assert torch.equal(tokens, expected) and rate > 0
    assert len(expected.unique()) > 3


def test_every_way_is_measured_as_often_as_asked():
    notes = {}
    found = dict(decode(TINY, 2, "cpu", notes.__setitem__, batches=(1, 4), prompt=5, new=6))
    assert notes == {"transformers": transformers.__version__}
    assert [*found] == [f"transformers, {way}: decode, batch {batch} (tokens/s)"
                        for way, batch in (("eager", 1), ("eager", 4), ("compiled", 1))]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found.values())
