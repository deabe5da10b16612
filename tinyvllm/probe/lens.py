"""Logits of rows of the residual stream: what the model would say if it ended here (the logit lens).

The last layer's row gives the model's own logits. A row from before gives what final norm and output projection make
of a stream that is not finished: how an answer takes shape over the layers.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.probe.errors import ProbeError
from tinyvllm.runner.model_runner import ModelRunner


def lens_logits(runner: ModelRunner, residual: np.ndarray) -> np.ndarray:
    """float32 [rows, V] from residual uint16 [rows, H] (bfloat16 bits): final norm and output projection."""
    backend, weights = runner.backend, runner.weights
    rows = backend.upload(backend.empty((residual.size,), np.uint16), np.ascontiguousarray(residual))
    normed = backend.empty(residual.shape, np.uint16)
    logits = backend.empty((len(residual), runner.config.vocab_size), np.uint16)
    with backend.exclusive():
        backend.operations["rms_norm"](normed, rows, weights.final_norm, runner.dims.eps)
        backend.operations["linear"](logits, normed, weights.lm_head, weights.no_bias)
    return bf16_to_float32(backend.download(logits))


def top(logits: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int64 [rows, n], logits float32 [rows, n], logsumexp float64 [rows]) of float32 logits [rows, V].

    Ties fall to the lower id; NaN comes last, and is left out of the sum. n is cut to V.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ProbeError(f"n is how many tokens to show, 1 or more, got {n!r}")
    n = min(n, logits.shape[1])
    usable = np.where(np.isnan(logits), -np.inf, logits)
    ids = np.empty((len(logits), n), np.int64)
    for row, values in enumerate(usable):
        border = np.partition(values, len(values) - n)[len(values) - n]  # the n-th largest
        candidates = np.flatnonzero(values >= border)
        ids[row] = candidates[np.argsort(-values[candidates], kind="stable")[:n]]
    largest = usable.max(axis=1).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        total = largest + np.log(np.exp(usable - largest[:, None]).sum(axis=1))
    return ids, np.take_along_axis(logits, ids, axis=1), total
