"""Shared fixtures: one tiny random model a session, and engines on it."""

import pytest

from tests.model_files import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a tiny random Llama with tokenizer and chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def make_llm(tiny_model):
    """make_llm(**options): an LLM on the tiny model, on the CPU, with small buffers."""
    from tinyvllm import LLM

    def make(model=tiny_model, **options):
        options = {"device": "cpu", "max_num_seqs": 16, "max_num_batched_tokens": 256, "num_blocks": 128,
                   "use_tqdm": False, **options}
        return LLM(model, **options)

    return make


@pytest.fixture(scope="session")
def llm(make_llm):
    """One engine that tests share; it is idle between them."""
    return make_llm()
