"""What a recording says of itself: model and machine, never a path, and the texts of the tokens in it."""

import json
import platform

from tinyvllm import SamplingParams, __version__
from tinyvllm.demo.show import PROMPTS
from tinyvllm.engine.live import LiveEngine
from tinyvllm.engine.recording import describe_run, token_ids_in
from tinyvllm.engine.replay import ReplayEngine
from tinyvllm.engine.trace import Trace


def test_a_recording_tells_model_machine_and_vocabulary(make_llm, tmp_path):
    with LiveEngine(make_llm("demo")) as live:
        live.add(PROMPTS[0], SamplingParams(temperature=0, max_tokens=20))
        live.wait_idle()
        events = live.events.read()[0]
        metadata = describe_run(live.llm, events)
        texts = {i: live.token_text(i) for i in token_ids_in(events)}
    assert metadata["model"] == "demo" and metadata["device"] == "cpu"
    assert metadata["environment"]["python"] == platform.python_version()
    assert metadata["environment"]["tinyvllm"] == __version__ and metadata["environment"]["processor"]
    assert 10 < len(texts) < 60 and metadata["vocabulary"] == {str(i): text for i, text in texts.items()}
    assert str(tmp_path.parent) not in json.dumps(metadata) and "/demo" not in json.dumps(metadata)
    with ReplayEngine(Trace(events, metadata).save(tmp_path / "run.jsonl.gz"), paused=True) as replay:
        assert {i: replay.token_text(i) for i in texts} == texts
        assert replay.metadata == metadata


def test_models_are_named_and_not_where_they_lie(llm, make_llm, tmp_path, tiny_model):
    assert describe_run(llm)["model"] == "model" and describe_run(llm)["vocabulary"] == {}
    snapshot = tmp_path / "models--somebody--Tiny-Llama" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny_model)
    assert describe_run(make_llm(snapshot))["model"] == "somebody/Tiny-Llama"
    assert "vocabulary" not in describe_run(make_llm(skip_tokenizer_init=True))
