"""Single kernels of a step as the model launches them, timed in graphs over the weights of all layers.

A graph goes through the layers one after the other, so that no weight is read from the cache twice. Figures are
microseconds a launch; what they move and compute, and what share of the roofs that is, says gpu_roofline.py.
A kernel that fails gives its error in the place of figures, and the others go on.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyvllm.bench.gpu_model import Bench, random_bits
from tinyvllm.bench.gpu_timing import graph_milliseconds
from tinyvllm.kernels import roofs

ROWS = (1, 8, 32, 64, 128, 256, 512, 2048, 16384)
DECODE_ATTENTION = ((1, 128), (8, 256), (64, 4096), (256, 256))  # requests, tokens of context
BLOCKS_A_MULTIPROCESSOR = (8, 16, 32)  # of the reading kernel: the best of them counts

Measured = Iterator[tuple[str, list[float] | Exception]]


def attempt(label: str, measure: Callable[[], list[float]]) -> tuple[str, list[float] | Exception]:
    """(label, measure()), or the error in its place."""
    try:
        return label, measure()
    except Exception as error:
        return label, error


def fused_operations(bench: Bench) -> Any:
    """What launches the kernels. Raises RuntimeError where operations run one by one instead."""
    if bench.backend.fused is None:
        raise RuntimeError("single kernels are measured as graphs launch them: leave out --eager")
    return bench.backend.fused


def ceiling(bench: Bench, rounds: int) -> Measured:
    """How fast the cache of keys, gigabytes of memory, can be read and nothing else done."""
    fused, keys = fused_operations(bench), bench.runner.kv_cache.k
    num_bytes = keys.nbytes // (16 * roofs.UNROLL * roofs.THREADS) * (16 * roofs.UNROLL * roofs.THREADS)
    out = bench.backend.empty((4,), np.int32)

    def rates(blocks: int) -> list[float]:
        def read():
            roofs.read_kernel.direct.launch((blocks * fused.num_multiprocessors, 1, 1), roofs.THREADS, 0,
                                            fused.stream, (out.address, keys.address, num_bytes, 1))

        return [num_bytes / t / 1e9 for t in graph_milliseconds(fused.stream, read, rounds)]

    yield attempt("ceiling: read (TB/s)", lambda: max(map(rates, BLOCKS_A_MULTIPROCESSOR), key=np.median))


def fill_buffers(bench: Bench) -> None:
    """Random numbers in every activation."""
    bits = random_bits(1 << 22, seed=1, scale=1.0)
    for array in bench.runner.buffers:
        bench.fill(array, bits)


def put_numbers(bench: Bench, numbers) -> Any:
    """A device array of int32."""
    numbers = np.ascontiguousarray(numbers, np.int32)
    array = bench.backend.empty(numbers.shape, np.int32)
    bench.backend.put(array.reshape(numbers.size), 0, numbers.reshape(-1))
    return array


def layer_launches(bench: Bench, rows: int, positions: Any, slots: Any) -> dict[str, Callable[[int], None]]:
    """name -> launch(layer): a layer's four products with their neighbours, for so many rows."""
    runner, fused = bench.runner, bench.backend.fused
    w, kv, dims = runner.weights, runner.kv_cache, runner.dims
    residual, hidden, qkv, attn, gate_up, act = (
        array[:rows] for array in (runner.buffers.residual, runner.buffers.hidden, runner.buffers.qkv,
                                   runner.buffers.attn, runner.buffers.gate_up, runner.buffers.act))

    def project(i):
        fused.norm_qkv_rope_write(qkv, kv.k[i], kv.v[i], hidden, residual, w.input_norm[i], w.qkv[i],
                                  positions[:rows], slots[:rows], w.cos_sin, dims.eps, dims.num_heads,
                                  dims.num_kv_heads, dims.head_dim, dims.block_size)

    return {"qkv": project,
            "o": lambda i: fused.linear_add(residual, hidden, attn, w.o[i]),
            "gate_up": lambda i: fused.norm_gate_up(act, gate_up, hidden, residual, w.post_attention_norm[i],
                                                    w.gate_up[i], dims.eps),
            "down": lambda i: fused.linear_add(residual, hidden, act, w.down[i])}


def kernels(bench: Bench, rounds: int, rows=ROWS) -> Measured:
    """The products as a step launches them: with norm, rotary embedding, cache write, gate and residual."""
    fused, runner = fused_operations(bench), bench.runner
    w, buf, dims, stream = runner.weights, runner.buffers, runner.dims, fused.stream
    fill_buffers(bench)
    most, tokens = bench.sizes.max_num_seqs, np.arange(max(rows))
    positions, slots = put_numbers(bench, tokens % bench.sizes.max_model_len), put_numbers(bench, tokens)
    token_ids = bench.backend.empty((most,), np.int32)

    def once(launch):
        return lambda: [1e3 * t for t in graph_milliseconds(stream, launch, rounds)]

    def in_every_layer(launch):
        def all_layers():
            for i in range(dims.num_layers):
                launch(i)

        return lambda: [1e3 * t / dims.num_layers for t in graph_milliseconds(stream, all_layers, rounds)]

    for n in rows:
        for name, launch in layer_launches(bench, n, positions, slots).items():
            yield attempt(f"kernel: {name}, batch {n} (us)", in_every_layer(launch))
        if n <= most:  # a step has one row of logits a request
            yield attempt(f"kernel: lm_head, batch {n} (us)", once(lambda n=n: fused.norm_logits(
                buf.logits[:n], buf.last[:n], buf.residual[:n], slots[:n], w.final_norm, w.lm_head, dims.eps)))
            yield attempt(f"kernel: argmax, batch {n} (us)", once(
                lambda n=n: fused.argmax(token_ids[:n], buf.logits[:n])))


def decode_attention(bench: Bench, rounds: int, cases=DECODE_ATTENTION) -> Measured:
    """One row a request over a paged context; also as bytes of keys and values a second."""
    fused, buf, dims, kv = fused_operations(bench), bench.runner.buffers, bench.runner.dims, bench.runner.kv_cache
    for batch, context in cases:
        width = context // dims.block_size
        blocks = np.random.default_rng(2).permutation(kv.k.shape[1])[:batch * width]
        tables = put_numbers(bench, blocks.reshape(batch, width))
        lens, starts = put_numbers(bench, np.full(batch, context)), put_numbers(bench, np.arange(batch + 1))

        def attend(batch=batch, tables=tables, lens=lens, starts=starts):
            for i in range(dims.num_layers):
                fused.attention(buf.attn[:batch], buf.qkv[:batch], kv.k[i], kv.v[i], tables, lens, starts, batch,
                                dims.scale, dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.block_size)

        def measure(attend=attend):
            return [1e3 * t / dims.num_layers for t in graph_milliseconds(fused.stream, attend, rounds)]

        label, times = attempt(f"kernel: decode attention, {batch} x {context} (us)", measure)
        yield label, times
        if not isinstance(times, Exception):
            num_bytes = 4 * batch * context * dims.num_kv_heads * dims.head_dim
            yield label.replace("(us)", "(TB/s)"), [num_bytes / t / 1e6 for t in times]
