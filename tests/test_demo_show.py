"""`tinyvllm demo` on the embedded model: completions, live view and summary."""

import io
import re

import pytest
from rich.console import Console

from tinyvllm import LLM
from tinyvllm.cli import main
from tinyvllm.demo.show import PROMPTS, run_demo


def make_llm():
    return LLM("demo", device="cpu", max_num_seqs=4, block_size=8, num_blocks=128, use_tqdm=False)


@pytest.mark.parametrize("terminal", [False, True])
def test_eight_completions_and_a_summary(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, height=40,
                      _environ={"TERM": "xterm-256color"})  # not the TERM of whoever runs the tests
    outputs = run_demo(make_llm, console=console)
    text = console.file.getvalue()
    assert len(outputs) == len(PROMPTS) == 8
    for prompt, output in zip(PROMPTS, outputs):
        assert output.finished and output.outputs[0].finish_reason == "stop"
        assert prompt[:40] in text
    for name in ("TTFT", "TPOT", "tokens/s", "prefix cache", "preemptions", "first token"):
        assert name in text
    hits = int(re.search(r"(\d+) of \d+ prompt tokens found", text)[1])
    assert hits > 0, "the prompts share their beginning: some of it should be found in the cache"
    assert ("KV cache" in text) == terminal  # the live view is for terminals alone


def test_plain_output_through_the_command(capsys):
    assert main(["demo", "--plain", "--device", "cpu"]) == 0
    assert "Summary" in capsys.readouterr().out


def test_speed_is_checked(capsys):
    assert main(["demo", "--speed", "0", "--device", "cpu"]) == 2
    assert "--speed must be a number of steps a second above 0, got 0.0" in capsys.readouterr().err
