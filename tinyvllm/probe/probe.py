"""`Probe`: looks into a running engine between two steps, and touches its weights.

    llm.engine.add_request("Once upon a time", request_id="story")
    llm.probe.watch("story")
    llm.engine.step()
    llm.probe.attention(rows=[3], layers=[0])      float32 [1, heads, 1, 4]
    llm.probe.top("story", 5)

Everything is pulled: what nobody asks for is not computed, and an engine that is not watched does nothing for it.
All methods belong to the thread that steps the engine, between two steps (LiveEngine.between_steps runs a function
there).
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from tinyvllm.bench.ceilings import Ceilings, ceilings
from tinyvllm.kernels.bf16 import bf16_to_float32
from tinyvllm.probe.attention import AttentionView
from tinyvllm.probe.errors import ProbeError, check_number
from tinyvllm.probe.lens import lens_logits, top
from tinyvllm.probe.profiler import StepProfile, StepProfiler
from tinyvllm.probe.weights import Patch, WeightEditor
from tinyvllm.runner.model_runner import ModelRunner
from tinyvllm.runner.watch import RequestWatch

if TYPE_CHECKING:
    from tinyvllm.llm import LLM


class Probe:
    """Looks into the engine of an LLM (`llm.probe`). After `llm.reset` nothing is watched, and patches stay."""

    def __init__(self, llm: "LLM"):
        self._llm = llm
        self._weights = WeightEditor(llm)
        self.last_profile: StepProfile | None = None  # the newest one
        self._ceilings: Ceilings | None = None  # once they have been measured

    # ---- one request ----

    def watch(self, request_id: str, max_tokens: int = 1024) -> None:
        """From the next step on keep queries and activations of this request's tokens, at positions below max_tokens.

        One request is watched at a time; what was kept of another is let go. The request need not be there yet, or
        any more. Needs 2 * L * max_tokens * (Hq * D + H) bytes of the device. Raises ProbeError, or
        OutOfDeviceMemoryError and then nothing is watched.
        """
        if not isinstance(request_id, str):
            raise ProbeError(f"a request id is text, got {request_id!r}")
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise ProbeError(f"max_tokens is a whole number of 1 or more, got {max_tokens!r}")
        runner = self._runner
        runner.watch = None  # its memory first
        max_tokens = min(max_tokens, self._llm.memory_plan.max_model_len)
        runner.watch = RequestWatch(request_id, max_tokens, runner.dims, runner.config.hidden_size, runner.backend)

    def unwatch(self) -> None:
        """Keep nothing any more, and let go of what was kept."""
        self._runner.watch = None

    @property
    def watched(self) -> str | None:
        """The id of the request that is watched."""
        watch = self._runner.watch
        return None if watch is None else watch.request_id

    @property
    def kept(self) -> list[int]:
        """The positions whose queries and activations are kept, ascending.

        Missing are those that were computed before `watch`, those whose blocks came from the prefix cache, and after
        a preemption those that are yet to be computed again.
        """
        watch = self._runner.watch
        return [] if watch is None else np.flatnonzero(watch.is_kept[:watch.context]).tolist()

    @property
    def context(self) -> int:
        """Tokens of the watched request whose keys are in the cache: the last axis of `attention`."""
        watch = self._runner.watch
        return 0 if watch is None else watch.context

    def attention(self, rows: Any, layers: Any = None, heads: Any = None) -> np.ndarray:
        """float32 [layers, heads, rows, context]: what the watched request's tokens at `rows` attend to.

        rows: positions, out of `kept`; layers, heads: numbers, or None for all. Each row sums to 1; columns after
        its own position are 0. Works after the request has ended, too, until another one is given its blocks.
        Raises ProbeError.
        """
        return self._attention().weights(rows, layers, heads)

    def attention_uint8(self, rows: Any, layers: Any = None, heads: Any = None, width: int | None = None) -> np.ndarray:
        """uint8 [layers, heads, rows, width]: as `attention`, as round(255 * weight), for drawing.

        width: pool to so many columns, each the largest of its share (a context that is not longer stays as it is).
        Both happen on the device, so that little travels.
        """
        return self._attention().bytes(rows, layers, heads, width)

    def attention_cell(self, layer: int, head: int, row: int, column: int) -> dict[str, Any]:
        """One attention weight with every number on the way to it, for showing the arithmetic.

        q, k, value: float32 [D], and q_bits, k_bits, value_bits: the bfloat16 they are; products: float32 [D], q * k;
        dot: their sum, added in order; scale; score = dot * scale; masked: whether the key lies in the query's
        future; row_max, denominator: of the row's softmax; exp = exp(score - row_max), 0 where masked;
        weight = exp / denominator: the element of `attention`. kv_head, block_id, offset: where key and value are.
        """
        return self._attention().cell(layer, head, row, column)

    def hidden(self, position: int) -> np.ndarray:
        """float32 [L + 1, H]: the residual stream as it entered each layer at a kept position, and as it left the last.

        The first is the token's embedding.
        """
        return bf16_to_float32(self._residual(position))

    def logit_lens(self, position: int, n: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the model would say next if it ended at each layer, at a kept position: final norm and logits of each.

        Returns ids int64 [L + 1, n], logits float32 [L + 1, n] and logsumexp float64 [L + 1], rows as in `hidden`:
        the last one is the model's own answer. See `top`.
        """
        return top(lens_logits(self._runner, self._residual(position)), n)

    # ---- logits ----

    def logits(self, request_id: str) -> np.ndarray | None:
        """float32 [V]: the logits that this request's newest token was chosen from, or None if they are gone.

        They are there if the last step chose a token for it. For the watched request they are there at any time,
        after its end too: computed again from what was kept.
        """
        runner = self._runner
        for row, request in enumerate(runner.last_sampled):
            if request.request_id == request_id:
                return bf16_to_float32(np.array(runner.backend.download(runner.buffers.logits[row])))
        watch = runner.watch
        if watch is None or watch.request_id != request_id or watch.request is None:
            return None
        position = watch.request.num_tokens - 2  # of the token that the newest one was chosen after
        if not watch.request.num_output_tokens or position >= watch.max_tokens or not watch.is_kept[position]:
            return None
        return lens_logits(runner, self._residual(position)[-1:])[0]

    def top(self, request_id: str, n: int = 10) -> tuple[np.ndarray, np.ndarray, float] | None:
        """(ids int64 [n], logits float32 [n], logsumexp of all logits) of the n most likely tokens; None as `logits`.

        The probability of one is exp(logit - logsumexp), at temperature 1. Ties: the lower id first.
        """
        logits = self.logits(request_id)
        if logits is None:
            return None
        ids, best, total = top(logits[None], n)
        return ids[0], best[0], float(total[0])

    # ---- the cache ----

    def kv(self, layer: int, block_id: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys, values) of one block of one layer: uint16 [Hkv, block_size, D], bfloat16 bits, copied.

        Slots that no token has been written to yet hold zeros, or what was there for an earlier request.
        """
        runner = self._runner
        check_number("layer", layer, runner.dims.num_layers)
        check_number("block", block_id, self._llm.memory_plan.num_blocks)
        return tuple(np.array(runner.backend.download(cache[layer, block_id])) for cache in runner.kv_cache)

    # ---- times ----

    def profile_next_step(self) -> None:
        """Run the next step operation by operation with a clock around each; its tokens are the same.

        The result is kept in `last_profile`, and emitted as one event "step_profiled", if somebody listens. Steps are
        computed twice over for it, the first time without the clock, so that nothing is measured cold. (The very first
        profile on a machine compiles the CPU kernels one by one: some seconds.)
        """
        runner = self._runner
        runner.profiler = StepProfiler(runner.config, runner.backend, self._profiled)

    def _profiled(self, profile: StepProfile) -> None:
        self.last_profile = profile
        events = self._llm.engine.events
        if events is not None:
            # With the roofs, if they are known: a recording is looked at on other machines.
            roofs = {} if self._ceilings is None else {"ceilings": self._ceilings._asdict()}
            events.emit("step_profiled", None, profile.operations, {**profile.about, **roofs})

    def ceilings(self) -> Ceilings:
        """How fast this device can read and multiply (bench/ceilings.py): measured in half a second, once a process."""
        self._ceilings = ceilings(self._llm.device)
        return self._ceilings

    # ---- weights ----

    def weight_names(self) -> dict[str, tuple[int, ...]]:
        """{name in the checkpoint: shape} of every weight. A tied model has no lm_head.weight: it is the embedding."""
        return self._weights.shapes

    def weight(self, name: str, rows: Any = slice(None), columns: Any = None) -> np.ndarray:
        """uint16 [rows, columns] (a vector's: [rows]): bfloat16 bits as the engine has them now, copied.

        rows, columns: a slice, a number or several; all if left out. Raises ProbeError.
        """
        return self._weights.read(name, rows, columns)

    def set_weight(self, name: str, row: int, column: int | None, bits: int) -> int:
        """Put these bfloat16 bits in the place of one element of the running engine; returns those that were there.

        column: None for a vector (norms and biases). From the next step on every request is computed with it; keys and
        values that are in the cache stay as they are, but nothing of them is found again as a prefix. In a tied model
        model.embed_tokens.weight is the output projection too, and both change. Raises ProbeError.
        """
        return self._weights.write(name, row, column, bits)

    @property
    def patches(self) -> list[Patch]:
        """(name, row, column, old, new) of every element that differs from the checkpoint, oldest first."""
        return self._weights.patches

    def restore(self) -> None:
        """Put every patched element back."""
        self._weights.restore()

    # ---- details ----

    @property
    def _runner(self) -> ModelRunner:
        """The runner, at rest."""
        self._llm._settle()
        return self._llm.runner

    def _attention(self) -> AttentionView:
        return AttentionView(self._runner, self._watching())

    def _watching(self) -> RequestWatch:
        watch = self._runner.watch
        if watch is None:
            raise ProbeError("no request is watched: call watch(request_id), and let the engine run a step of it")
        return watch

    def _residual(self, position: int) -> np.ndarray:
        """uint16 [L + 1, H]: the residual stream at a kept position."""
        watch = self._watching()
        position = check_number("position", position, watch.max_tokens)
        if not watch.is_kept[position]:
            raise ProbeError(f"position {position} of request {watch.request_id!r} was not kept: it was computed "
                             "before watch(), came from the prefix cache, or is yet to come (`kept` lists what there "
                             "is)")
        download = self._runner.backend.download
        layers = range(watch.residual.shape[0])
        return np.stack([np.array(download(watch.residual[layer, position])) for layer in layers])
