"""One value of the running model, as bits: what BitLens shows when something is clicked elsewhere.

Any panel can open the lens: `ui.client.inspect(address)` in JavaScript, `feed.inspect(**address)` in Python. An address
is a dictionary with a kind and where the value is:

    weight   name, row, column          the checkpoint's name; column None for a vector (norms, biases)
    kv       part, layer, block, head, offset, dim     part "key" or "value"; head: a KV head; offset: slot in the block
    query    layer, head, position, dim                of the watched request, after RoPE
    hidden   layer, position, index                    of the watched request; the stream that enters a layer
    logit    request, token                            the newest logits of a request; token: an id of the vocabulary

A weight's address may also say what the file holds there: format, bits, file, offset. Then the lens needs no engine.
"""

import operator
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from tinyvllm.errors import TinyVLLMError
from tinyvllm.kernels.bf16 import float32_to_bf16
from widgets.answers.base import answers

KEYS = {
    "weight": ("name", "row", "column"), "kv": ("part", "layer", "block", "head", "offset", "dim"),
    "query": ("layer", "head", "position", "dim"), "hidden": ("layer", "position", "index"),
    "logit": ("request", "token"),
}
OPTIONAL = ("column", "format", "bits", "file", "offset", "n")


def check_address(address: Mapping[str, Any]) -> None:
    """Raise TinyVLLMError unless this says which value is meant."""
    kind = address.get("kind")
    if not isinstance(kind, str) or kind not in KEYS:
        raise TinyVLLMError(f"an address has a kind out of {', '.join(KEYS)}, got {kind!r}")
    missing = [key for key in KEYS[kind] if address.get(key) is None and key != "column"]
    if missing:
        raise TinyVLLMError(f"the address of a {kind} needs {', '.join(KEYS[kind])}; {missing[0]} is missing")
    extra = sorted(set(address) - {"kind", *KEYS[kind], *OPTIONAL})
    if extra:
        raise TinyVLLMError(f"the address of a {kind} has no {extra[0]!r}; it has {', '.join(KEYS[kind])}")
    if address.get("part", "key") not in ("key", "value"):
        raise TinyVLLMError(f"part is 'key' or 'value', got {address['part']!r}")


def words(address: Mapping[str, Any]) -> str:
    """An address as one would say it: "layers.3.self_attn.q_proj.weight [12, 40]"."""
    at = address.get
    if at("kind") == "weight":
        where = at("row") if at("column") is None else f"{at('row')}, {at('column')}"
        return f"{str(at('name')).removeprefix('model.')} [{where}]"
    if at("kind") == "kv":
        return (f"{at('part')} in the cache: layer {at('layer')}, KV head {at('head')}, block {at('block')}, slot "
                f"{at('offset')} [{at('dim')}]")
    if at("kind") == "query":
        return f"query: layer {at('layer')}, head {at('head')}, position {at('position')} [{at('dim')}]"
    if at("kind") == "hidden":
        return f"residual stream into layer {at('layer')}, position {at('position')} [{at('index')}]"
    return f"logit of token {at('token')}, request {at('request')}"


@answers("inspect")
def inspect(feed: Any, **address: Any) -> Future:
    """A Future of {words, format, bits, source, note, editable, loaded, patches}.

    source: "model", or "file" where no engine can be looked into but the address says what the file holds; note then
    says why. loaded: a weight's bits as they were loaded, if they were changed since, else None. patches: weights
    changed in all.
    """
    check_address(address)
    looked = feed.look(_look, address)
    return looked if address.get("bits") is None else _or_from_file(looked, address)


def _or_from_file(looked: Future, address: dict[str, Any]) -> Future:
    told: Future = Future()

    def decide(done: Future) -> None:
        if done.exception() is None:
            told.set_result(done.result())
            return
        note = "no engine here" if not isinstance(done.exception(), TinyVLLMError) else str(done.exception())
        told.set_result({"words": words(address), "format": address["format"], "bits": address["bits"],
                         "source": "file", "note": note, "editable": False, "loaded": None, "patches": 0})

    looked.add_done_callback(decide)
    return told


def _look(llm: Any, address: dict[str, Any]) -> dict[str, Any]:
    bits = LOOKS[address["kind"]](llm.probe, address)
    told = {"words": words(address), "format": "bf16", "bits": int(bits), "source": "model", "note": "",
            "editable": address["kind"] == "weight",
            "loaded": None, "patches": len(llm.probe.patches)}
    if told["editable"]:
        place = tuple(address.get(key) for key in KEYS["weight"])
        told["loaded"] = next((int(p.old) for p in llm.probe.patches if (p.name, p.row, p.column) == place), None)
    return told


# Each returns bfloat16 bits: that is how the engine keeps all of these.


def _weight(probe: Any, at: dict[str, Any]) -> int:
    found = probe.weight(at["name"], at["row"], at.get("column"))
    if found.size != 1:
        raise TinyVLLMError(f"{at['name']} is a matrix, so its address needs a column too")
    return found.item()


def _kv(probe: Any, at: dict[str, Any]) -> int:
    block = probe.kv(at["layer"], at["block"])[at["part"] == "value"]
    return _element(block, at, ("head", "offset", "dim"))


def _query(probe: Any, at: dict[str, Any]) -> int:
    cell = probe.attention_cell(at["layer"], at["head"], at["position"], 0)
    return _element(cell["q_bits"], at, ("dim",))


def _hidden(probe: Any, at: dict[str, Any]) -> int:
    return _as_bf16(_element(probe.hidden(at["position"]), at, ("layer", "index")))


def _logit(probe: Any, at: dict[str, Any]) -> int:
    logits = probe.logits(str(at["request"]))
    if logits is None:
        raise TinyVLLMError(f"the logits of request {at['request']} are gone: they are there right after a step that "
                            "chose a token for it, and for a watched request")
    return _as_bf16(_element(logits, at, ("token",)))


LOOKS: dict[str, Callable[[Any, dict[str, Any]], int]] = {
    "weight": _weight, "kv": _kv, "query": _query, "hidden": _hidden, "logit": _logit}


def _element(array: np.ndarray, at: dict[str, Any], keys: tuple[str, ...]) -> Any:
    for key, size in zip(keys, array.shape):
        value = at[key]
        if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= operator.index(value) < size:
            raise TinyVLLMError(f"{key} {value!r} is not there: it can be 0 to {size - 1}")
    return array[tuple(operator.index(at[key]) for key in keys)].item()


def _as_bf16(value: float) -> int:
    """float32 that the engine has widened from bfloat16: back again, which loses nothing."""
    return float32_to_bf16(np.float32(value).reshape(1))[0]
