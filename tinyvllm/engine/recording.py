"""What a recording says of itself: the model, the machine, and the texts of the tokens that occur in it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyvllm import __version__
from tinyvllm.bench.environment import describe_environment
from tinyvllm.engine.events import Event
from tinyvllm.loader.resolve import DEMO_NAME, demo_model_folder


def describe_run(llm: Any, events: Iterable[Event] = ()) -> dict[str, Any]:
    """Metadata for a Trace: {"model", "device", "gpu" (on one), "environment": {...}, "vocabulary": {id: text}}.

    llm: the LLM that the events came from. The vocabulary has the tokens of these events alone, with the id as text
    (JSON knows no other keys), and is left out without a tokenizer.
    """
    found: dict[str, Any] = {"model": _model_name(llm.model_path), "device": llm.device}
    if llm.device == "cuda":
        found["gpu"] = _gpu_name()
    found["environment"] = {**describe_environment(), "tinyvllm": __version__}
    if llm.tokenizer is not None:
        texts = {i: token_text(llm.tokenizer, i) for i in sorted(token_ids_in(events))}
        found["vocabulary"] = {str(i): text for i, text in texts.items() if text is not None}
    return found


def token_text(tokenizer: Any, token_id: int) -> str | None:
    """The text of one token; a character that is split over several tokens shows as U+FFFD. None if there is none."""
    if tokenizer is None or token_id < 0 or tokenizer.id_to_token(token_id) is None:
        return None
    return tokenizer.id_to_bytes(token_id).decode("utf-8", "replace")


def token_ids_in(events: Iterable[Event]) -> set[int]:
    """Every token id that these events mention, of prompts and of outputs."""
    found: set[int] = set()
    for event in events:
        if event.kind == "tokens":
            found.update(token_id for _, token_id, _ in event.a)
        elif event.kind == "request_added" and not isinstance(event.a, int):
            found.update(event.a)
    return found


def _model_name(folder: Path) -> str:
    """What a user calls the model in this folder: never where the folder lies."""
    if folder == demo_model_folder():
        return DEMO_NAME
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):  # of the hub's cache
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def _gpu_name() -> str:
    from numba import cuda  # only where there is one: the CPU path must work without

    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)
