"""What BitLens can do to an engine: change a weight of the running model, run a prompt again, put all back."""

import itertools
from concurrent.futures import Future
from typing import Any

from tinyvllm import SamplingParams
from tinyvllm.errors import TinyVLLMError
from widgets.answers.base import answers
from widgets.answers.inspect import check_address, words

_numbers = itertools.count(1)


@answers("set_weight")
def set_weight(feed: Any, name: str, row: int, column: int | None, bits: int) -> Future:
    """Write bfloat16 bits into the running model, between two steps. A Future of {words, old, bits, patches}."""
    address = {"kind": "weight", "name": name, "row": row, "column": column}
    check_address(address)

    def patch(llm: Any) -> dict[str, Any]:
        old = llm.probe.set_weight(name, row, column, bits)
        return {"words": words(address), "old": int(old), "bits": bits, "patches": len(llm.probe.patches)}

    return feed.look(patch)


@answers("restore_weights")
def restore_weights(feed: Any) -> Future:
    """Put every changed weight back. A Future of {restored: how many}."""

    def restore(llm: Any) -> dict[str, Any]:
        count = len(llm.probe.patches)
        llm.probe.restore()
        return {"restored": count}

    return feed.look(restore)


@answers("generate_again")
def generate_again(feed: Any, prompt: str = "", max_tokens: int = 60) -> Future:
    """Run a prompt greedily in the running engine, beside whatever else it does.

    prompt: text, given to the model as a chat message where it has a chat template; empty: the newest request's prompt.
    A Future of {request, prompt, text, finish_reason, patches: weights changed while it ran}.
    """
    source = feed.source
    if source is None:
        raise TinyVLLMError("there is no engine behind this panel: BitLens(live) has one")
    if not hasattr(source, "llm"):
        raise TinyVLLMError("a recorded run cannot generate: this needs a LiveEngine")
    llm = source.llm
    token_ids = _typed_prompt(llm, prompt) if prompt.strip() else _newest_prompt(feed)
    request_id = f"again-{next(_numbers)}"
    done: Future = Future()

    def take(output: Any) -> None:  # in the engine's thread
        if output.request_id == request_id and output.finished and not done.done():
            remove()
            done.set_result({
                "request": request_id, "text": output.outputs[0].text, "patches": len(llm.probe.patches),
                "finish_reason": output.outputs[0].finish_reason, "prompt": prompt.strip() or _text(llm, token_ids)})

    def give_up(error: BaseException, of: str | None) -> None:
        if of in (None, request_id) and not done.done():
            remove()
            done.set_exception(TinyVLLMError(f"the text was not finished: {error}"))

    remove = source.on_output(take, give_up)
    try:
        source.add({"prompt_token_ids": token_ids}, SamplingParams(temperature=0, max_tokens=max_tokens), request_id)
    except BaseException:
        remove()
        raise
    return done


def _typed_prompt(llm: Any, prompt: str) -> list[int]:
    if llm.tokenizer is None:
        raise TinyVLLMError("this engine has no tokenizer, so it cannot read a typed prompt: leave the field empty to "
                            "run the newest prompt again")
    if llm.tokenizer.chat_template is None:
        return llm.tokenizer.encode(prompt)
    return llm.chat_token_ids([{"role": "user", "content": prompt.strip()}])


def _newest_prompt(feed: Any) -> list[int]:
    with feed.lock:
        known = [r.prompt_token_ids for r in feed.state.requests.values() if r.prompt_token_ids]
    if not known:
        raise TinyVLLMError("nothing has run yet: type a prompt")
    return list(known[-1])


def _text(llm: Any, token_ids: list[int]) -> str:
    return "the newest prompt" if llm.tokenizer is None else llm.tokenizer.decode(token_ids).strip()
