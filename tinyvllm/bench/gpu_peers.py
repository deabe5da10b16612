"""The same work by cuBLAS and cuDNN, through torch, in the same process and in turn with ours.

    products           out = x @ weight.T alone, for 1 to 16,384 rows: both sides read the very same arrays in memory,
                       all layers one after the other, in a graph
    prefill_attention  causal grouped-query attention over whole prompts: ours from the paged cache, theirs from
                       contiguous copies of the same keys and values

Rounds alternate between the two, so that a clock that changes changes both. Before anything is timed, the results are
compared: a product that is not the product has no time. Without torch only our side is measured.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinyvllm.bench.gpu_kernels import ROWS, Measured, attempt, fill_buffers, fused_operations, put_numbers
from tinyvllm.bench.gpu_model import Bench, random_bits
from tinyvllm.bench.gpu_timing import capture, graph_time

ATTENTION = ((16, 1024), (4, 4096))  # prompts, tokens
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION")  # of torch's attention: the first that runs
MOST_ERROR = 0.02  # of the difference to the values: two roundings to bfloat16 are 0.003 apart


class TorchPeer:
    """torch on the current GPU. Raises ImportError or RuntimeError where that is not to be had."""

    device = "cuda"

    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        self.torch = torch

    def versions(self) -> dict[str, str]:
        """What is compared with."""
        found = {"torch": self.torch.__version__, "cuda": self.torch.version.cuda,
                 "cudnn": self.torch.backends.cudnn.version()}
        for name in ("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                pass
        return {name: str(version) for name, version in found.items()}

    def tensor(self, array: Any) -> Any:
        """The same memory as a bfloat16 tensor. array: a DeviceArray of bfloat16 bits."""
        return self.torch.as_tensor(_Int16(array), device="cuda").view(self.torch.bfloat16)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """A function that replays what `launch` launches."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
            launch()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            launch()
        return graph.replay

    def milliseconds(self, run: Callable[[], None]) -> float:
        """Of the GPU's work for one run."""
        before, after = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)


class _Int16:
    """An array of 16-bit patterns as torch takes it: as signed integers."""

    def __init__(self, array: Any):
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "typestr": "<i2"}
        self.array = array


def in_turn(rounds: int, ours: Callable[[], float], theirs: Callable[[], float] | None
            ) -> tuple[list[float], list[float]]:
    """`rounds` figures of each side (none of theirs without a peer), after one of each for nothing."""
    figures = [(ours(), theirs() if theirs else 0.0) for _ in range(rounds + 1)][1:]
    return [our for our, _ in figures], [their for _, their in figures] if theirs else []


def differ(peer: TorchPeer, ours: Any, theirs: Any) -> None:
    """Raise RuntimeError unless the two tensors hold the same, up to rounding."""
    ours, theirs = ours.float(), theirs.float()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < MOST_ERROR:  # NaN is not
        raise RuntimeError(f"the results differ from torch's by {error:.3g} of their size: not timed")


# ---- products ----


def product(fused: Any, out: Any, x: Any, weight: Any) -> None:
    """out = x @ weight.T by the kernel that a step takes for so many rows, and nothing else."""
    few = fused._few_rows(x, weight.shape[0], False, "plain")
    if few is not None:
        fused._run_few_rows(few, "plain", out, x, weight)
    else:
        fused._linear(out, x, weight)


def products(bench: Bench, rounds: int, peer: TorchPeer | None, rows=ROWS) -> Measured:
    """Microseconds a product, ours and cuBLAS's."""
    runner, fused = bench.runner, fused_operations(bench)
    w, buf, layers = runner.weights, runner.buffers, range(runner.dims.num_layers)
    fill_buffers(bench)
    logits = bench.backend.empty((max(rows), bench.config.vocab_size), np.uint16)
    cases = {"qkv": (buf.residual, buf.qkv, [w.qkv[i] for i in layers]),
             "o": (buf.attn, buf.hidden, [w.o[i] for i in layers]),
             "gate_up": (buf.residual, buf.gate_up, [w.gate_up[i] for i in layers]),
             "down": (buf.act, buf.hidden, [w.down[i] for i in layers]),
             "lm_head": (buf.residual, logits, [w.lm_head])}
    for n in rows:
        for name, (x, out, weights) in cases.items():
            yield from pair(f"product: {name}, {n} rows (us)", f"cuBLAS: {name}, {n} rows (us)",
                            lambda x=x[:n], out=out[:n], weights=weights: _product_times(
                                bench, rounds, peer, fused, x, out, weights))


def pair(our_label: str, their_label: str, measure: Callable[[], tuple[list[float], list[float]]]) -> Measured:
    """The figures of both sides, or the error in the place of ours."""
    label, figures = attempt(our_label, measure)
    if isinstance(figures, Exception):
        yield label, figures
        return
    yield label, figures[0]
    if figures[1]:
        yield their_label, figures[1]


def _product_times(bench, rounds, peer, fused, x, out, weights):
    stream = fused.stream

    def launch():
        for weight in weights:
            product(fused, out, x, weight)

    graph = capture(stream, launch)
    replay = None
    if peer is not None:
        ours, theirs, inputs = peer.tensor(out), peer.tensor(out), peer.tensor(x)
        matrices = [peer.tensor(weight) for weight in weights]

        def launch_theirs():
            for matrix in matrices:
                peer.torch.mm(inputs, matrix.t(), out=theirs)

        graph.launch(stream)
        stream.synchronize()
        ours = ours[:256].clone()  # the last layer's; theirs is about to overwrite it
        peer.synchronize()
        replay = peer.capture(launch_theirs)
        replay()
        peer.synchronize()
        differ(peer, ours, theirs[:256])
    each = 1e3 / len(weights)
    return in_turn(rounds, lambda: each * graph_time(stream, graph),
                   replay and (lambda: each * peer.milliseconds(replay)))


# ---- attention ----


def prefill_attention(bench: Bench, rounds: int, peer: TorchPeer | None, note: Callable[[str, str], None],
                      cases=ATTENTION) -> Measured:
    """Microseconds of a layer's attention. note(what, value): which of torch's ways it was."""
    fused_operations(bench)
    dims, kv = bench.runner.dims, bench.runner.kv_cache
    fill_buffers(bench)
    bits = random_bits(1 << 22, seed=3, scale=1.0)
    blocks = max(count * length for count, length in cases) // dims.block_size
    for i in range(dims.num_layers):
        bench.fill(kv.k[i][:blocks], bits[i:])  # no two layers alike
        bench.fill(kv.v[i][:blocks], bits[1000 + i:])
    for count, length in cases:
        label = f"prefill attention, {count} x {length} (us)"
        yield from pair(label, f"torch: {label}",
                        lambda count=count, length=length: _attention_times(bench, rounds, peer, note, count, length))


def _attention_times(bench, rounds, peer, note, count, length):
    fused, buf, dims, kv = bench.backend.fused, bench.runner.buffers, bench.runner.dims, bench.runner.kv_cache
    tokens, width = count * length, length // dims.block_size
    table = np.random.default_rng(4).permutation(count * width).reshape(count, width)
    tables, lens = put_numbers(bench, table), put_numbers(bench, np.full(count, length))
    starts = put_numbers(bench, np.arange(count + 1) * length)
    out, qkv = buf.attn[:tokens], buf.qkv[:tokens]

    def attend():
        for i in range(dims.num_layers):
            fused.attention(out, qkv, kv.k[i], kv.v[i], tables, lens, starts, 0, dims.scale, dims.num_heads,
                            dims.num_kv_heads, dims.head_dim, dims.block_size)

    graph = capture(fused.stream, attend)
    theirs = None
    if peer is not None:
        graph.launch(fused.stream)
        fused.stream.synchronize()
        heads = count, length, -1, dims.head_dim
        queries = peer.tensor(qkv).view(heads)[:, :, :dims.num_heads].transpose(1, 2).contiguous()
        ours = peer.tensor(out).view(heads).transpose(1, 2).clone()
        pages = peer.torch.as_tensor(table, device=queries.device)

        def contiguous(cache):  # [blocks, heads, block_size, D] -> [prompts, heads, tokens, D]
            return peer.tensor(cache)[pages].transpose(1, 2).reshape(count, dims.num_kv_heads, length, dims.head_dim)

        layers = [(contiguous(kv.k[i]), contiguous(kv.v[i])) for i in range(dims.num_layers)]
        peer.synchronize()
        backend, result = next(_attention_ways(peer, queries, *layers[-1]))
        note(f"attention of torch, {count} x {length}", backend)
        differ(peer, ours, result)

        def theirs():
            with _only(peer, backend):
                return peer.milliseconds(lambda: [_attend(peer, queries, *layer) for layer in layers])

    each = 1e3 / dims.num_layers
    return in_turn(rounds, lambda: each * graph_time(fused.stream, graph), theirs and (lambda: each * theirs()))


def _attend(peer, queries, keys, values):
    return peer.torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True,
                                                                 enable_gqa=True)


def _only(peer, backend: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, backend))


def _attention_ways(peer, *operands) -> Iterator[tuple[str, Any]]:
    """(name, result) of the ways that torch can go, the preferred one first. Raises RuntimeError if there is none."""
    errors = []
    for backend in BACKENDS:
        try:
            with _only(peer, backend):
                result = _attend(peer, *operands)
            peer.synchronize()
        except RuntimeError as error:
            errors.append(f"{backend}: {str(error).splitlines()[0]}")
        else:
            yield backend, result
    raise RuntimeError("torch runs this attention in none of its ways: " + "; ".join(errors))
