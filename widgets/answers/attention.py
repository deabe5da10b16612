"""What AttentionScope asks: the arithmetic of one weight, and what a head would do without its mask or its scale."""

from concurrent.futures import Future
from typing import Any

import numpy as np

from tinyvllm.errors import TinyVLLMError
from widgets.answers.base import answers
from widgets.frames import Payload


@answers("attention_cell")
def attention_cell(feed: Any, request: str, layer: int, head: int, row: int, column: int, causal: bool = True,
                   scaled: bool = True) -> Future:
    """A Future of the numbers on the way to one weight of the watched request (see Probe.attention_cell).

    causal=False or scaled=False: row_max, exp, denominator and weight are those of the "what if". Arrays: q, k,
    products, value float32 [D], exps float32 [C], the row's numerators.
    """
    return feed.look(_cell, request, layer, head, row, column, causal, scaled)


@answers("attention_what_if")
def attention_what_if(feed: Any, request: str, layer: int, head: int, causal: bool = True,
                      scaled: bool = True) -> Future:
    """A Future of all kept rows of one head, recomputed without mask or without scale, from the same queries and keys.

    Arrays: positions int32 [R], weights uint8 [R, context], as round(255 * weight).
    """
    return feed.look(_what_if, request, layer, head, causal, scaled)


def _cell(llm: Any, request: str, layer: int, head: int, row: int, column: int, causal: bool, scaled: bool) -> Payload:
    _check_watched(llm, request)
    cell = llm.probe.attention_cell(layer, head, row, column)
    vectors_of = {name: np.asarray(cell[name], np.float32) for name in ("q", "k", "products", "value")}
    numbers = {name: value for name, value in cell.items() if not isinstance(value, np.ndarray)}
    if causal and scaled:
        exps = llm.probe.attention([row], [layer], [head])[0, 0, 0] * np.float32(cell["denominator"])
    else:
        what_if, exps = _without(llm, layer, head, row, column, causal, scaled)
        numbers |= what_if
    numbers |= {"layer": layer, "head": head, "row": row, "column": column, "causal": causal, "scaled": scaled,
                "context": len(exps), "visible": row + 1 if causal else len(exps)}
    return Payload({name: _plain(value) for name, value in numbers.items()},
                   {**vectors_of, "exps": exps.astype(np.float32)})


def _without(llm: Any, layer: int, head: int, row: int, column: int, causal: bool, scaled: bool):
    """({score, row_max, exp, denominator, weight, masked}, numerators of the row) without mask or scale."""
    from tinyvllm.probe.vectors import head_vectors

    vectors = head_vectors(llm, layer, head)
    scores = vectors.k @ vectors.q[np.searchsorted(vectors.positions, row)]
    if scaled:
        scores *= np.float32(vectors.scale)
    score = scores[column]
    if causal:
        scores[row + 1:] = -np.inf
    exps = np.exp(scores - scores.max())
    denominator = exps.sum()
    return {"score": score, "masked": causal and column > row, "row_max": scores.max(), "exp": exps[column],
            "denominator": denominator, "weight": exps[column] / denominator}, exps


def _what_if(llm: Any, request: str, layer: int, head: int, causal: bool, scaled: bool) -> Payload:
    from tinyvllm.probe.vectors import head_vectors, softmax_rows

    _check_watched(llm, request)
    vectors = head_vectors(llm, layer, head)
    weights = np.rint(255 * softmax_rows(vectors, causal=causal, scaled=scaled)).astype(np.uint8)
    return Payload({"layer": layer, "head": head, "causal": causal, "scaled": scaled, "context": len(vectors.k)},
                   {"positions": vectors.positions.astype(np.int32), "weights": weights})


def _check_watched(llm: Any, request: str) -> None:
    if llm.probe.watched != request:
        watched = llm.probe.watched
        now = f"kept now: request {watched!r}" if watched else "nothing is kept now"
        raise TinyVLLMError(f"the queries of request {request!r} are no longer kept ({now}). Its picture stays, its "
                         "arithmetic has gone: run the prompt again to look closer")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
