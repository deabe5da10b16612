"""The fused operations on a GPU: which kernels each one launches, for how many rows.

                    compute capability 9.0                                  8.0 and newer
    up to 4 rows    gemm/few_rows.py: a product and its neighbours in     (up to 8 rows the same)
                    one kernel
    some hundred    a norm kernel, then gemm/skinny.py: a product and       a norm kernel, gemm/tensor_core.py, and a
                    what comes after it (its choose_shape says how many)    kernel for what comes after it
    more            a norm kernel, then gemm/wgmma.py; the rotary           (the same)
                    embedding has a kernel of its own

With batch_invariant=True few_rows.py is left out, and skinny.py takes its rows and whatever it cuts the sums of.

Launches go to the driver directly, on one stream (kernels/driver.py). On compute capability 9.0 they are chained by
programmatic dependent launch.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from tinyvllm.kernels.attention import prefill
from tinyvllm.kernels.attention.decode_registers import NO_HINTS
from tinyvllm.kernels.cuda_support import ceil_div, compute_capability, cuda, pointer
from tinyvllm.kernels.driver import Stream
from tinyvllm.kernels.fused import attention, draw, greedy, key_bins, rope_write, rows, take_sampled, thresholds
from tinyvllm.kernels.fused.tensor_maps import TensorMaps
from tinyvllm.kernels.gemm import few_rows, skinny, tensor_core, wgmma

__all__ = ["FusedOperations", "can_run", "can_choose"]

MOST_SHARED_BYTES = 160 * 1024  # few_rows keeps x in shared memory; beyond this it is left to the other kernels
FEW_ROWS_HOPPER = 4  # from here on wgmma is faster: at 8 rows a step takes 894 us by skinny.py, 937 by few_rows.py
NO_ADDRESSES = (0,) * 7


def can_run(weights: Any, dims: Any) -> bool:
    """Whether these kernels can run a model: no biases, rows of whole 16 bytes, heads of whole mma steps."""
    biases = (weights.qkv_bias, weights.o_bias, weights.gate_up_bias, weights.down_bias)
    depths = weights.embed.shape[1], weights.down.shape[2], weights.o.shape[2]
    return (not any(bias.size for bias in biases) and not any(depth % 8 for depth in depths)
            and prefill.tensor_core_can_run(dims.num_heads, dims.num_kv_heads, dims.head_dim))


def can_choose(vocab_size: int) -> bool:
    """Whether argmax and sample here are made for so many logits."""
    return vocab_size % 8 == 0 and vocab_size <= draw.MOST_COLUMNS


def _bucket(num_rows: int) -> int:
    """1, 2, 4 or 8: what few_rows.py is made for."""
    return 1 << (num_rows - 1).bit_length()


class FusedOperations:
    """Bound to one stream of the current device. `table` is for llama_fused.bind; arrays are DeviceArrays.

    hopper: use what only compute capability 9.0 has (default: where the device is one).
    batch_invariant: add up in an order that does not depend on the number of rows or requests.
    """

    def __init__(self, stream: Stream, hopper: bool | None = None, batch_invariant: bool = False):
        self.stream, self.batch_invariant = stream, batch_invariant
        self.hopper = self.dependent = compute_capability() == (9, 0) if hopper is None else hopper
        self.wgmma_prefill_rows = attention.WGMMA_PREFILL_ROWS
        self.hints = NO_HINTS  # for decode attention; whoever sets others sets these again
        self.maps = TensorMaps(stream)
        self.num_multiprocessors = cuda.get_current_device().MULTIPROCESSOR_COUNT
        self._scratch: dict[int, Any] = {}  # kept for good: graphs refer to them
        self.table: MappingProxyType[str, Callable] = MappingProxyType({
            "embedding": self.embedding, "norm_qkv_rope_write": self.norm_qkv_rope_write,
            "attention": self.attention, "linear_add": self.linear_add, "norm_gate_up": self.norm_gate_up,
            "norm_logits": self.norm_logits, "keep_rows": self.keep_rows})

    # ---- the operations: see numpy_twin.py ----

    def embedding(self, out, input_ids, table) -> None:
        depth = out.shape[1]
        self._run(rows.gather_rows_kernel(depth, self.dependent), (out.shape[0], rows.column_blocks(depth), 1),
                  rows.THREADS, 0, out.address, table.address, input_ids.address)

    def norm_qkv_rope_write(self, qkv, k_cache, v_cache, hidden, residual, norm_weight, weight, positions, slots,
                            cos_sin, eps, num_heads, num_kv_heads, head_dim, block_size) -> None:
        fused = self._few_rows(residual, weight.shape[0], True, "rope", head_dim)
        if fused is not None:
            self._run_few_rows(fused, "rope", qkv, residual, weight, (
                norm_weight.address, 0, positions.address, slots.address, cos_sin.address, k_cache.address,
                v_cache.address), (num_heads, num_kv_heads, block_size, eps))
            return
        self._norm(hidden, residual, norm_weight, 0, eps)
        if self.hopper and head_dim in (64, 128) and self._skinny(
                "rope", qkv, hidden, weight, (positions.address, slots.address, cos_sin.address, k_cache.address,
                                              v_cache.address), (num_heads, num_kv_heads, block_size), head_dim):
            return
        self._linear(qkv, hidden, weight)
        self._run(rope_write.rope_write_kernel(head_dim, self.dependent), (qkv.shape[0], 1, 1), rope_write.THREADS, 0,
                  qkv.address, positions.address, slots.address, cos_sin.address, k_cache.address, v_cache.address,
                  num_heads, num_kv_heads, block_size)

    def attention(self, out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes, scale,
                  num_heads, num_kv_heads, head_dim, block_size) -> None:
        arguments = (out, qkv, k_cache, v_cache, block_tables, seq_lens, query_start_loc, num_decodes,
                     scale * prefill.LOG2_E, num_heads, num_kv_heads, head_dim, block_size)
        if num_decodes:
            attention.decode_rows(self, *arguments)
        if num_decodes < block_tables.shape[0]:
            attention.prompt_rows(self, *arguments)

    def linear_add(self, residual, hidden, x, weight) -> None:
        fused = self._few_rows(x, weight.shape[0], False, "add")
        if fused is not None:
            self._run_few_rows(fused, "add", residual, x, weight)
            return
        if self._product("add", residual, x, weight):
            return
        self._linear(hidden, x, weight)
        depth = hidden.shape[1]
        self._run(rows.add_rows_kernel(depth, self.dependent), (hidden.shape[0], rows.column_blocks(depth), 1),
                  rows.THREADS, 0, residual.address, hidden.address)

    def norm_gate_up(self, act, gate_up, hidden, residual, norm_weight, weight, eps) -> None:
        fused = self._few_rows(residual, weight.shape[0], True, "silu")
        if fused is not None:
            self._run_few_rows(fused, "silu", act, residual, weight, (norm_weight.address, *NO_ADDRESSES[1:]),
                               (0, 0, 0, eps))
            return
        self._norm(hidden, residual, norm_weight, 0, eps)
        if self._product("silu", act, hidden, weight):
            return
        self._linear(gate_up, hidden, weight)
        depth = act.shape[1]
        self._run(rows.gate_rows_kernel(depth, self.dependent), (act.shape[0], rows.column_blocks(depth), 1),
                  rows.THREADS, 0, act.address, gate_up.address)

    def norm_logits(self, logits, last, residual, indices, norm_weight, weight, eps) -> None:
        if not logits.shape[0]:
            return
        fused = self._few_rows(last, weight.shape[0], True, "plain")
        if fused is not None:
            self._run_few_rows(fused, "plain", logits, residual, weight,
                               (norm_weight.address, indices.address, *NO_ADDRESSES[2:]), (0, 0, 0, eps),
                               num_rows=logits.shape[0])
            return
        self._norm(last, residual, norm_weight, indices.address, eps)
        self._linear(logits, last, weight)

    def keep_rows(self, kept, layer, source, positions) -> None:
        """Nothing is launched when there are no positions: while nobody watches, this costs a comparison."""
        num_rows = positions.shape[0]
        if num_rows:
            width = kept.shape[2]
            kernel = rows.keep_rows_kernel(width, self.dependent, self._shared_percent(num_rows))
            self._run(kernel, (num_rows, rows.column_blocks(width), 1), rows.THREADS, 0, kept[layer].address,
                      source.address, positions.address, source.shape[1])

    def take_sampled(self, input_ids, sampled) -> None:
        """As take_sampled_numpy."""
        count = input_ids.shape[0]
        self._run(take_sampled.take_sampled_kernel(self.dependent), (ceil_div(count, take_sampled.THREADS), 1, 1),
                  take_sampled.THREADS, 0, input_ids.address, sampled.address, count)

    def argmax(self, ids, logits) -> None:
        """As argmax_numpy, if can_choose."""
        num_rows, vocab_size = logits.shape
        parts = max(1, min(ceil_div(vocab_size, 8 * greedy.THREADS), 4 * self.num_multiprocessors // num_rows))
        scratch = self._workspace(2 * num_rows * parts)
        self._run(greedy.best_of_parts_kernel(self.dependent), (parts, num_rows, 1), greedy.THREADS,
                  greedy.SHARED_BYTES, scratch, logits.address, vocab_size)
        self._run(greedy.best_of_row_kernel(self.dependent), (num_rows, 1, 1), greedy.THREADS, greedy.SHARED_BYTES,
                  ids.address, scratch, parts)

    def sample(self, ids, logits, temperature, top_k, top_p, seed, position) -> None:
        """As sample_numpy, if can_choose. Parameters may change between replays of what was captured."""
        num_rows, vocab_size = logits.shape
        plan = draw.make_plan(num_rows, vocab_size, self.num_multiprocessors)
        records = self._workspace(plan.scratch_bytes // 4)
        found, parts = records + plan.thresholds_at, records + plan.parts_at
        given = logits.address, temperature.address, top_k.address, top_p.address
        count, find = key_bins.count_kernel(self.dependent), thresholds.find_kernel(self.dependent)
        best, choose = draw.draw_kernel(self.dependent), draw.choose_kernel(self.dependent)
        self._run(count, (plan.count_parts, num_rows, 1), key_bins.COUNT_THREADS, count.shared_bytes, records, *given,
                  vocab_size, plan.count_vectors)
        self._run(find, (num_rows, 1, 1), find.threads, find.shared_bytes, found, records, *given, vocab_size,
                  plan.count_parts)
        self._run(best, (plan.draw_parts, num_rows, 1), draw.DRAW_THREADS, best.shared_bytes, parts, found, *given,
                  seed.address, position.address, vocab_size, plan.draw_vectors)
        self._run(choose, (num_rows, 1, 1), 32, 0, ids.address, parts, plan.draw_parts)

    # ---- parts of them ----

    def _run(self, kernel, grid, threads, shared_bytes, *arguments, dependent=None) -> None:
        kernel.direct.launch(grid, threads, shared_bytes, self.stream, arguments,
                             self.dependent if dependent is None else dependent)

    def _workspace(self, num_floats: int) -> int:
        """Address of scratch memory; undefined contents, one kernel's until it ends."""
        size = 1 << max(12, (num_floats - 1).bit_length())
        if size not in self._scratch:
            self._scratch[size] = cuda.device_array(size, np.float32)
        return pointer(self._scratch[size])

    def _shared_percent(self, num_rows: int) -> int | None:
        """For kernels between those for a few rows: fast memory divided as they do, for a change holds up all three."""
        few = self.hopper and num_rows <= FEW_ROWS_HOPPER and not self.batch_invariant
        return few_rows.SHARED_PERCENT[_bucket(num_rows)] if few else None

    def _few_rows(self, x, num_outputs: int, norm: bool, after: str, head_dim: int = 0):
        """The kernel for a few rows, or None if there are too many, or too wide ones. (It adds up in another order than
        those for many.)"""
        num_rows, depth = x.shape
        if self.batch_invariant or num_rows > (FEW_ROWS_HOPPER if self.hopper else few_rows.MAX_ROWS):
            return None
        narrow = self.hopper and few_rows.can_be_narrow(num_rows, depth, after, num_outputs, self.num_multiprocessors)
        kernel = few_rows.few_rows_kernel(_bucket(num_rows), depth, norm, after, head_dim, self.dependent, narrow)
        return kernel if kernel.shared_bytes <= MOST_SHARED_BYTES else None

    def _run_few_rows(self, kernel, after, out, x, weight, addresses=NO_ADDRESSES, numbers=(0, 0, 0, 0.0),
                      num_rows=None) -> None:
        tiles = few_rows.num_tiles(after, weight.shape[0], kernel.narrow)
        self._run(kernel, (min(tiles, 2 * self.num_multiprocessors), 1, 1), kernel.threads, kernel.shared_bytes,
                  out.address, x.address, weight.address, *addresses, x.shape[0] if num_rows is None else num_rows,
                  weight.shape[0], tiles, *numbers)

    def _norm(self, out, x, weight, row_numbers: int, eps: float) -> None:
        kernel = rows.norm_rows_kernel(x.shape[1], self.dependent)
        self._run(kernel, (out.shape[0], 1, 1), rows.THREADS, kernel.shared_bytes, out.address, x.address,
                  weight.address, row_numbers, eps)

    def _product(self, after: str, out, x, weight) -> bool:
        """A product and what comes after it, by the kernels of compute capability 9.0; False where they cannot."""
        if not self.hopper or out.shape[1] % 8:
            return False
        return self._skinny(after, out, x, weight) or self._wgmma(after, out, x, weight)

    def _skinny(self, after, out, x, weight, addresses=(0,) * 5, numbers=(0,) * 3, head_dim: int = 0,
                shape: tuple | None = None) -> bool:
        """shape: of skinny_kernel, in place of the one for these sizes."""
        (num_rows, depth), num_outputs = x.shape, weight.shape[0]
        if shape is None:
            choose = skinny.choose_invariant_shape if self.batch_invariant else skinny.choose_shape
            shape = choose(num_rows, num_outputs, depth, head_dim, self.num_multiprocessors)
            if shape is None:
                return False
        kernel = skinny.skinny_kernel(*shape, after, head_dim)
        kernel.direct.launch(kernel.grid(num_rows, num_outputs), kernel.threads, kernel.shared_bytes, self.stream,
                             (self.maps.of(weight, kernel.box_rows), self.maps.of(x, kernel.x_rows), out.address,
                              *addresses, num_rows, num_outputs, depth, *numbers), True, kernel.cluster)
        return True

    def _wgmma(self, after, out, x, weight) -> bool:
        (num_rows, depth), num_outputs = x.shape, weight.shape[0]
        kernel = wgmma.wgmma_kernel(wgmma.choose_width(num_rows, num_outputs, after, self.num_multiprocessors), after)
        self._run(kernel, (self.num_multiprocessors, 1, 1), kernel.threads, kernel.shared_bytes,
                  self.maps.of(x, wgmma.BM), self.maps.of(weight, kernel.box_rows), self.maps.of(out, 64), num_rows,
                  num_outputs, depth)
        return True

    def _linear(self, out, x, weight) -> None:
        if self._product("plain", out, x, weight):
            return
        (num_rows, depth), num_outputs = x.shape, weight.shape[0]
        tile = tensor_core.choose_tile(num_rows, num_outputs)
        kernel = tensor_core.tensor_core_kernel(*tile)
        self._run(kernel, (ceil_div(num_rows, tile[0]), ceil_div(num_outputs, tile[1]), 1), kernel.threads,
                  kernel.shared_bytes, out.address, x.address, weight.address, 0, num_rows, num_outputs, depth,
                  dependent=False)
