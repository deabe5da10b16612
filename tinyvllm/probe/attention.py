"""Attention of a watched request, computed again from its kept queries and the keys in the paged cache."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.probe.errors import ProbeError, check_number, check_numbers
from tinyvllm.runner.model_runner import ModelRunner
from tinyvllm.runner.watch import RequestWatch


class AttentionView:
    """Attention weights over the paged cache of one ModelRunner, for the request that its RequestWatch keeps."""

    def __init__(self, runner: ModelRunner, watch: RequestWatch):
        self.runner, self.watch = runner, watch

    def weights(self, rows: Any, layers: Any = None, heads: Any = None) -> np.ndarray:
        """float32 [layers, heads, rows, context]."""
        rows, layers, heads = self._check(rows, layers, heads)
        out = np.empty((len(layers), len(heads), len(rows), self.watch.context), np.float32)
        if out.size:
            for i, weights, _ in self._by_layer(rows, layers, heads):
                out[i] = self.runner.backend.download(weights)[0]
        return out

    def bytes(self, rows: Any, layers: Any = None, heads: Any = None, width: int | None = None) -> np.ndarray:
        """uint8 [layers, heads, rows, width]; pooled and rounded on the device."""
        rows, layers, heads = self._check(rows, layers, heads)
        if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
            raise ProbeError(f"width is the number of columns to pool to, 1 or more, or None, got {width!r}")
        backend = self.runner.backend
        width = min(self.watch.context, width or self.watch.context)
        out = np.empty((len(layers), len(heads), len(rows), width), np.uint8)
        if out.size:
            small = backend.empty((len(heads) * len(rows), width), np.uint8)
            for i, weights, _ in self._by_layer(rows, layers, heads):
                with backend.exclusive():
                    backend.operations["pool_uint8"](small, weights.reshape(len(small), self.watch.context))
                out[i] = backend.download(small).reshape(out.shape[1:])
        return out

    def cell(self, layer: int, head: int, row: int, column: int) -> dict[str, Any]:
        """One weight, with every number on the way to it."""
        rows, layers, heads = self._check([row], [layer], [head])
        column = check_number("column (position of a key)", column, self.watch.context)
        self._check_keys(column)
        row, layer, head = int(row), int(layer), int(head)
        (_, weights, statistics), = self._by_layer(rows, layers, heads)
        download, dims = self.runner.backend.download, self.runner.dims
        largest, denominator = np.array(download(statistics)).reshape(2)
        weight = np.array(download(weights)).reshape(-1)[column]
        q_bits = np.array(download(self.watch.queries[layer, row]))[head * dims.head_dim:(head + 1) * dims.head_dim]
        kv_head = head // (dims.num_heads // dims.num_kv_heads)
        block, offset = divmod(column, dims.block_size)
        block_id = self.watch.block_ids[block]
        k_bits, value_bits = (np.array(download(cache[layer, block_id]))[kv_head, offset]
                              for cache in self.runner.kv_cache)
        q, k = bf16_to_float32(q_bits), bf16_to_float32(k_bits)
        products = q * k  # exact: the product of two bfloat16 numbers fits into a float32
        dot = np.add.accumulate(products, dtype=np.float32)[-1]  # one after the other, as the kernels add
        scale = np.float32(dims.scale)
        score = np.float32(dot * scale)
        masked = column > row
        return {"q": q, "k": k, "q_bits": q_bits, "k_bits": k_bits, "products": products, "dot": float(dot),
                "scale": float(scale), "score": float(score), "masked": masked, "row_max": float(largest),
                "exp": 0.0 if masked else float(np.exp(np.float32(score - largest))),
                "denominator": float(denominator), "weight": float(weight),
                "value": bf16_to_float32(value_bits), "value_bits": value_bits,
                "kv_head": kv_head, "block_id": block_id, "offset": offset}

    def _by_layer(self, rows: np.ndarray, layers: np.ndarray, heads: np.ndarray):
        """(number, weights [1, heads, rows, context], statistics [1, heads, rows, 2]) on the device, layer by layer.

        One layer at a time, so that a look at everything needs no memory for all of it on the device.
        """
        backend, watch = self.runner.backend, self.watch
        weights = backend.empty((1, len(heads), len(rows), watch.context), np.float32)
        statistics = backend.empty((1, len(heads), len(rows), 2), np.float32)
        block_table = np.array(watch.block_ids[:-(-watch.context // watch.block_size)], np.int32)
        block_table, heads, rows, device_layers = (self._upload(numbers)
                                                   for numbers in (block_table, heads, rows, layers))
        for i in range(len(layers)):
            with backend.exclusive():
                backend.operations["attention_rows"](
                    weights, statistics, watch.queries, self.runner.kv_cache.k, block_table,
                    device_layers[i:i + 1], heads, rows, self.runner.dims.scale)
            yield i, weights, statistics

    def _upload(self, numbers: np.ndarray):
        backend = self.runner.backend
        return backend.upload(backend.empty(numbers.shape, np.int32), numbers)

    def _check(self, rows: Any, layers: Any, heads: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        watch, dims = self.watch, self.runner.dims
        if not watch.context:
            raise ProbeError(f"nothing of request {watch.request_id!r} has been computed since watch(): "
                             "let the engine run a step of it")
        layers = check_numbers("layer", layers, dims.num_layers)
        heads = check_numbers("head", heads, dims.num_heads)
        if not isinstance(rows, Iterable):
            rows = [rows]
        rows = check_numbers("row (position of a query)", list(rows), watch.context)
        for row in rows.tolist():
            self._check_row(row)
        return rows, layers, heads

    def _check_row(self, row: int) -> None:
        watch = self.watch
        if row >= watch.max_tokens:
            raise ProbeError(f"position {row} of request {watch.request_id!r} was not kept: watch() keeps the first "
                             f"{watch.max_tokens} positions; watch it with a larger max_tokens")
        if not watch.is_kept[row]:
            raise ProbeError(f"position {row} of request {watch.request_id!r} was not kept: it was computed before "
                             "watch(), or its block came from the prefix cache (`kept` lists what there is)")
        self._check_keys(row)

    def _check_keys(self, last: int) -> None:
        """Raise ProbeError unless the keys at positions 0 .. last are still this request's."""
        watch = self.watch
        lost = [number for number in watch.overwritten if number * watch.block_size <= last]
        if lost:
            first = min(lost)
            raise ProbeError(
                f"the keys of request {watch.request_id!r} at positions {first * watch.block_size} to "
                f"{(first + 1) * watch.block_size - 1} are gone: request {watch.overwritten[first]!r} has been given "
                f"their block {watch.block_ids[first]}; rows before them can still be shown")
