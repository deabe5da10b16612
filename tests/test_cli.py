"""The `tinyvllm` command, as a user types it."""

import io

import pytest

from tests.model_files import write_tiny_model
from tinyvllm.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("cli") / "model"))


def options(model):
    return ["--model", model, "--device", "cpu", "--num-blocks", "64", "--max-tokens", "8", "--ignore-eos"]


def test_generate_streams_one_prompt(model, capsys):
    assert main(["generate", "The river", *options(model)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The river") and len(out) > len("The river") + 4


def test_generate_several_prompts(model, capsys):
    assert main(["generate", "The river", "The fox", *options(model)]) == 0
    out = capsys.readouterr().out
    assert "--- The river\n" in out and "--- The fox\n" in out


def test_chat_reads_lines_until_the_end(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/reset\nhello\n/quit\n"))
    assert main(["chat", *options(model)]) == 0
    answers = capsys.readouterr().out.rstrip("\n")
    half = len(answers) // 2
    assert len(answers) > 8 and answers[:half] == answers[-half:], "after /reset the same words get the same answer"


def test_inspect_shows_tensors_and_the_memory_plan(model, capsys):
    assert main(["inspect", model, "--memory", "1"]) == 0
    out = capsys.readouterr().out
    assert "model.embed_tokens.weight" in out and "BF16" in out and "KV" in out


@pytest.mark.parametrize("arguments, message", [
    (["generate", "x", "--model", "/no/such/folder"], "no/such/folder"),
    (["generate", "x", "--top-p", "2"], "top_p must be above 0 and at most 1 (1 keeps every token; for greedy decoding use temperature=0), got 2.0"),
    (["generate", "x", "--device", "tpu"], "device must be one of"),
    (["inspect", "/no/such/folder"], "no/such/folder"),
])
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_help_and_version(capsys):
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "continuous or static" in capsys.readouterr().out
