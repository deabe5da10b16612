"""Single kernels of a decode step, timed in graphs, beside the bandwidth that mere reading reaches."""

import numpy as np

from tinyvllm.kernels.cuda_support import cuda, kernel
from tinyvllm.kernels.driver import Event
from tinyvllm.kernels.ptx import block_index_x, grid_size_x, load_16_bytes, store_u32, thread_index


@kernel(signature=("uint64", "uint64", "int64"), max_threads=256)
def _read(out, source, count):
    """Read `count` pieces of 16 bytes, four under way a thread; out: where a sum that hardly ever comes up would go."""
    step = np.int64(grid_size_x()) * 256
    i = np.int64(block_index_x()) * 256 + thread_index()
    v = cuda.local.array((4, 4), np.uint32)
    total = np.uint32(0)
    while i + 3 * step < count:
        for n in range(4):
            v[n, 0], v[n, 1], v[n, 2], v[n, 3] = load_16_bytes(source + np.uint64(i + n * step) * np.uint64(16))
        for n in range(4):
            total = np.uint32(total ^ v[n, 0] ^ v[n, 1] ^ v[n, 2] ^ v[n, 3])
        i += 4 * step
    if total == 0x12345678:
        store_u32(out, total)


def graph_milliseconds(stream, launch, rounds: int) -> list[float]:
    """Of one replay of what `launch` launches."""
    launch()
    stream.synchronize()
    with stream.capture() as captured:
        launch()
    return graph_times(stream, captured.graph, rounds)


def graph_times(stream, graph, rounds: int) -> list[float]:
    """Milliseconds of each of `rounds` replays."""
    graph.launch(stream)
    times = []
    for _ in range(rounds):
        before, after = Event(), Event()
        before.record(stream)
        graph.launch(stream)
        after.record(stream)
        times.append(after.milliseconds_since(before))
    return times


def layer_operations(fused, w, kv, dims, ids, residual, hidden, qkv, attn, gate_up, act) -> dict:
    """name -> (stacked weights, launch(layer)) of a layer's four products."""
    def project(i):
        fused.norm_qkv_rope_write(qkv, kv.k[i], kv.v[i], hidden, residual, w.input_norm[i], w.qkv[i], ids, ids,
                                  w.cos_sin, dims.eps, dims.num_heads, dims.num_kv_heads, dims.head_dim,
                                  dims.block_size)

    return {"qkv": (w.qkv, project),
            "o": (w.o, lambda i: fused.linear_add(residual, hidden, attn, w.o[i])),
            "gate_up": (w.gate_up, lambda i: fused.norm_gate_up(act, gate_up, hidden, residual,
                                                                w.post_attention_norm[i], w.gate_up[i], dims.eps)),
            "down": (w.down, lambda i: fused.linear_add(residual, hidden, act, w.down[i]))}


def measure_kernels(bench, rounds: int):
    """label -> figures, for bench.main. Needs the fused operations."""
    fused, runner = bench.backend.fused, bench.runner
    w, buf, dims, kv = runner.weights, runner.buffers, runner.dims, runner.kv_cache
    stream, layers = fused.stream, dims.num_layers
    for array in buf:
        bits = np.random.default_rng(1).standard_normal(1 << 20, dtype=np.float32).view(np.uint32) >> 16
        flat = array.reshape(int(np.prod(array.shape)))
        bench.backend.put(flat, 0, np.resize(bits.astype(np.uint16), min(flat.shape[0], 1 << 23)))

    def read():
        _read.direct.launch((16 * fused.num_multiprocessors, 1, 1), 256, 0, stream,
                            (kv.v.address, kv.k.address, kv.k.nbytes // 16))

    yield "ceiling: read (TB/s)", [kv.k.nbytes / t / 1e9 for t in graph_milliseconds(stream, read, rounds)]

    ids = bench.backend.empty((256,), np.int32)
    bench.backend.put(ids, 0, np.arange(256, dtype=np.int32))

    for batch in (1, 8, 32, 128, 256):
        part = [array[:batch] for array in (buf.residual, buf.hidden, buf.qkv, buf.attn, buf.gate_up, buf.act)]
        residual, hidden, qkv, attn, gate_up, act = part
        launches = layer_operations(fused, w, kv, dims, ids[:batch], *part)
        for name, (weight, launch) in launches.items():
            def all_layers(launch=launch):
                for i in range(layers):
                    launch(i)

            times = graph_milliseconds(stream, all_layers, rounds)
            yield f"kernel: {name}, batch {batch} (us)", [1e3 * t / layers for t in times]
            yield f"kernel: {name}, batch {batch} (TB/s)", [weight.nbytes / t / 1e9 for t in times]
        logits, last, rows = buf.logits[:batch], buf.last[:batch], ids[:batch]
        times = graph_milliseconds(stream, lambda r=part[0], n=logits, h=last, i=rows: fused.norm_logits(
            n, h, r, i, w.final_norm, w.lm_head, dims.eps), rounds)
        yield f"kernel: lm_head, batch {batch} (us)", [1e3 * t for t in times]
        times = graph_milliseconds(stream, lambda i=rows, n=logits: fused.argmax(i, n), rounds)
        yield f"kernel: argmax, batch {batch} (us)", [1e3 * t for t in times]
        bench.backend.put(ids, 0, np.arange(256, dtype=np.int32))
    yield from measure_attention(bench, rounds)


def measure_attention(bench, rounds: int):
    """As measure_kernels, of decode attention alone: bytes of keys and values."""
    fused, buf, dims, kv = bench.backend.fused, bench.runner.buffers, bench.runner.dims, bench.runner.kv_cache
    for batch, context in ((1, 128), (8, 256), (64, 4096), (256, 256)):
        width = context // dims.block_size
        tables = bench.backend.empty((batch * width,), np.int32)
        blocks = np.random.default_rng(2).permutation(kv.k.shape[1])[:batch * width].astype(np.int32)
        bench.backend.put(tables, 0, blocks)
        lens = bench.backend.empty((batch,), np.int32)
        bench.backend.put(lens, 0, np.full(batch, context, np.int32))

        def attend(batch=batch, width=width, tables=tables, lens=lens):
            for i in range(dims.num_layers):
                fused.attention(buf.attn[:batch], buf.qkv[:batch], kv.k[i], kv.v[i], tables.reshape(batch, width), lens,
                                lens, batch, dims.scale, dims.num_heads, dims.num_kv_heads, dims.head_dim,
                                dims.block_size)

        times = graph_milliseconds(fused.stream, attend, rounds)
        bytes_read = 4 * batch * context * dims.num_kv_heads * dims.head_dim * dims.num_layers
        yield f"kernel: decode attention, {batch} x {context} (us)", [1e3 * t / dims.num_layers for t in times]
        yield f"kernel: decode attention, {batch} x {context} (TB/s)", [bytes_read / t / 1e9 for t in times]
