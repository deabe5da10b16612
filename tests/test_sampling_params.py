"""SamplingParams: contradictory or unknown parameters are refused in plain words."""

import numpy as np
import pytest

from tinyvllm import SamplingParams
from tinyvllm.errors import RequestError, TinyVLLMError


@pytest.mark.parametrize("options, message", [
    (dict(temperature=-0.1), r"temperature must be a number of 0 \(greedy\) or more, got -0.1"),
    (dict(temperature=float("nan")), "temperature must be"),
    (dict(temperature=float("inf")), "temperature must be"),
    (dict(temperature="hot"), "temperature must be a number.*'hot'"),
    (dict(top_k=-2), "top_k must be a whole number.*-2"),
    (dict(top_k=1.5), "top_k must be"),
    (dict(top_p=0.0), "top_p must be above 0.*for greedy decoding use temperature=0.*got 0.0"),
    (dict(top_p=1.01), "top_p must be above 0 and at most 1"),
    (dict(seed=1.5), "seed must be a whole number or None"),
    (dict(temperature=0, seed=3), "temperature=0 is greedy.*seed=3 would have no effect"),
    (dict(temperature=0, top_k=5), "temperature=0 is greedy.*top_k=5 would have no effect"),
    (dict(temperature=0, top_p=0.5), "temperature=0 is greedy.*top_p=0.5 would have no effect"),
    (dict(temperature=1e300), "temperature must be"),
    (dict(temperature=True), "temperature must be"),
    (dict(stop=5), "stop must be a non-empty string or a list of them, got 5"),
    (dict(stop_token_ids=5), "stop_token_ids must be a list of token ids"),
    (dict(stop_token_ids=[1.5]), "stop_token_ids must be"),
    (dict(max_tokens=0), "max_tokens must be a whole number of 1 or more"),
    (dict(max_tokens=True), "max_tokens must be"),
    (dict(stop=""), "stop must be a non-empty string or a list of them"),
    (dict(stop=["a", 3]), "stop must be"),
    (dict(stop_token_ids=[-1]), "stop_token_ids must be a list of token ids"),
    (dict(ignore_eos=1), "ignore_eos must be True or False"),
    (dict(temprature=1), "no option 'temprature'; did you mean 'temperature'.*max_tokens"),
    (dict(n=2), "does not support 'n'"),
    (dict(presence_penalty=0.5), "does not support 'presence_penalty'"),
    (dict(logprobs=5), "does not support 'logprobs'"),
])
def test_refused_in_plain_words(options, message):
    with pytest.raises(RequestError, match=message) as error:
        SamplingParams(**options)
    assert isinstance(error.value, TinyVLLMError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("options", [dict(n=1), dict(presence_penalty=0), dict(repetition_penalty=1.0),
                                     dict(logprobs=None), dict(skip_special_tokens=True), dict(min_p=0.0)])
def test_a_value_that_asks_for_nothing_is_let_pass(options):
    assert SamplingParams(**options) == SamplingParams()


def test_numpy_values_are_numbers_too():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(7), max_tokens=np.int32(5),
                            stop_token_ids=np.array([1, 2]), stop=np.array(["a", "b"]))
    assert params == SamplingParams(temperature=0.5, top_k=3, seed=7, max_tokens=5, stop_token_ids=[1, 2], stop=["a", "b"])
    assert type(params.seed) is int and type(params.stop_token_ids[0]) is int


def test_an_enormous_top_k_means_no_limit():
    assert SamplingParams(top_k=10**12).top_k == 2**31 - 1


def test_normalised():
    params = SamplingParams(stop="x", stop_token_ids=[3, 4], top_k=-1)
    assert (params.stop, params.stop_token_ids, params.top_k) == (("x",), (3, 4), 0)
    assert SamplingParams() == SamplingParams(temperature=1.0, max_tokens=16)
