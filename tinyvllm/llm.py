"""`LLM`: the whole engine behind one class, in the shape of vLLM's offline API.

    llm = LLM("demo")
    for out in llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=40)):
        print(out.outputs[0].text)
"""

import dataclasses
import functools
import numbers
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from tinyvllm.config import EngineConfig
from tinyvllm.engine.garbage import no_whole_collections
from tinyvllm.engine.llm_engine import LLMEngine
from tinyvllm.engine.request import Request
from tinyvllm.errors import ConfigError, OutOfDeviceMemoryError, RequestError, TinyVLLMError, TokenizerError
from tinyvllm.loader.checkpoint import Checkpoint
from tinyvllm.loader.resolve import resolve_model
from tinyvllm.loader.weights import load_weights
from tinyvllm.model.config import ModelConfig
from tinyvllm.options import refuse_unknown_options
from tinyvllm.outputs import RequestOutput
from tinyvllm.runner.device import make_backend
from tinyvllm.runner.memory import MemoryPlan, plan_memory, replan
from tinyvllm.runner.model_runner import ModelRunner
from tinyvllm.runner.weights import WeightStore
from tinyvllm.sampling_params import SamplingParams
from tinyvllm.text.messages import check_messages
from tinyvllm.text.tokenizer import Tokenizer
from tinyvllm.units import format_bytes

if TYPE_CHECKING:
    from tinyvllm.probe import Probe

Messages = Sequence[dict[str, str]]

# What `reset` can change on weights that are loaded: everything about batches and cache, nothing about the model.
RESETTABLE = ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching",
              "scheduling_policy", "use_kv_cache", "seed")


@refuse_unknown_options(ConfigError)
class LLM:
    """Loads a model and generates text with continuous batching over a paged KV cache.

    model: a folder in Hugging Face layout, "demo" for the embedded model, or the id of a model that is already in
    the local Hugging Face cache. use_tqdm: progress bars while loading and generating.
    The other arguments are those of `tinyvllm.config.EngineConfig`; None lets the engine choose.

    Raises ModelNotFoundError, ModelFileError, ConfigError, TokenizerError, DeviceError or OutOfDeviceMemoryError,
    all of them TinyVLLMError, with a message that says what to do. A folder without tokenizer.json can be used with
    token-id prompts if skip_tokenizer_init=True.
    """

    def __init__(self, model: str | os.PathLike = "demo", *, device: str = "auto", max_model_len: int | None = None,
                 max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None, block_size: int = 16,
                 num_blocks: int | None = None, gpu_memory_utilization: float = 0.9,
                 enable_prefix_caching: bool = True, enforce_eager: bool = False, batch_invariant: bool = False,
                 seed: int = 0, scheduling_policy: str = "continuous", use_kv_cache: bool = True,
                 skip_tokenizer_init: bool = False, use_tqdm: bool = True):
        self.engine_config = EngineConfig(
            device=device, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, block_size=block_size, num_blocks=num_blocks,
            gpu_memory_utilization=gpu_memory_utilization, enable_prefix_caching=enable_prefix_caching,
            enforce_eager=enforce_eager, batch_invariant=batch_invariant, seed=seed,
            scheduling_policy=scheduling_policy, use_kv_cache=use_kv_cache)
        self.use_tqdm = use_tqdm
        self._lock = threading.Lock()  # around every use of the engine: threads may share an LLM
        self._inbox: dict[str, deque[RequestOutput]] = {}  # outputs of requests that a stream() is reading
        self._abandoned: deque[str] = deque()  # streams that were let go of: their requests end before the next step
        self._awaited: dict[str, RequestOutput | None] = {}  # last outputs of requests that a generate() waits for
        self._driver: Any = None  # a weak reference to the LiveEngine that drives this, if one does
        self.model_path: Path = resolve_model(model)
        self.model_config = ModelConfig.from_folder(self.model_path)
        self.tokenizer = None if skip_tokenizer_init else Tokenizer.from_folder(self.model_path)
        if self.tokenizer is not None:
            self.tokenizer.check_fits(self.model_config.vocab_size)
        checkpoint = Checkpoint(self.model_path, self.model_config)
        self._backend = make_backend(device, enforce_eager, batch_invariant)
        self.device = self._backend.name
        # Planned before anything is allocated: a plan that cannot fit is refused with its numbers.
        self.memory_plan = plan_memory(self.model_config, self.engine_config, self._backend)
        try:
            store = WeightStore(self.model_config, self._backend)
            load_weights(checkpoint, self.model_config, store, progress=use_tqdm)
            self._weights = store.finish(self.memory_plan.max_model_len)
            self._make_engine()
        except OutOfDeviceMemoryError as error:
            raise OutOfDeviceMemoryError(f"{error} (the plan was: {self.memory_plan.describe()})") from None

    def _make_engine(self) -> None:
        plan, config = self.memory_plan, self.engine_config
        self.runner = ModelRunner(self.model_config, self._weights, self._backend, num_blocks=plan.num_blocks,
                                  block_size=config.block_size, max_model_len=plan.max_model_len,
                                  max_num_seqs=plan.max_num_seqs, max_num_batched_tokens=plan.max_num_batched_tokens)
        self.engine = LLMEngine(self.runner, self.tokenizer, vocab_size=self.model_config.vocab_size,
                                eos_token_ids=self.model_config.eos_token_ids, num_blocks=plan.num_blocks,
                                block_size=config.block_size, max_model_len=plan.max_model_len,
                                max_num_seqs=plan.max_num_seqs, max_num_batched_tokens=plan.max_num_batched_tokens,
                                enable_prefix_caching=config.enable_prefix_caching,
                                scheduling_policy=config.scheduling_policy, use_kv_cache=config.use_kv_cache,
                                seed=config.seed)

    def reset(self, **changes: Any) -> None:
        """A fresh, empty engine on the weights that are loaded already, with some options changed.

        changes: any of RESETTABLE. A new block_size keeps the cache's size in tokens unless num_blocks is given too.
        Requests that are still there are forgotten. Raises ConfigError, and then nothing has changed; or
        OutOfDeviceMemoryError, and then the engine is fresh and empty with the options that it had.
        """
        self._check_free()
        before = self.engine_config, self.memory_plan
        self.engine_config, self.memory_plan = self.plan_reset(**changes)
        self._inbox.clear()
        self.runner = self.engine = None  # let go of the old cache before there is a new one
        try:
            self._make_engine()
        except BaseException:  # an interrupt too: without an engine nothing works any more
            self.engine_config, self.memory_plan = before
            self._make_engine()
            raise

    @functools.cached_property
    def probe(self) -> "Probe":
        """Looks into the engine between two steps: attention, logits, activations, cache, weights, times."""
        from tinyvllm.probe import Probe  # here: most programs never look

        return Probe(self)

    def plan_reset(self, **changes: Any) -> tuple[EngineConfig, MemoryPlan]:
        """What `reset` would lead to; raises ConfigError for changes that cannot be, OutOfDeviceMemoryError for a cache
        that cannot be held."""
        for name in changes:
            if name not in RESETTABLE:
                raise ConfigError(f"{name!r} cannot be changed by a reset: it can change {', '.join(RESETTABLE)}; "
                                  "for anything else make a new LLM")
        config = dataclasses.replace(self.engine_config, **changes)
        plan = replan(self.memory_plan, self.model_config, config, set(changes))
        room = self._backend.memory_info()[0] + self.memory_plan.kv_cache_bytes  # which goes before the new one comes
        if plan.kv_cache_bytes > room:
            raise OutOfDeviceMemoryError(f"a KV cache of {plan.num_blocks} blocks of {format_bytes(plan.block_bytes)} "
                                         f"does not fit into the {format_bytes(room)} that there are: lower num_blocks")
        return config, plan

    def generate(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
                 use_tqdm: bool | None = None) -> list[RequestOutput]:
        """Generate for one prompt or many; returns their outputs in the order of the prompts.

        prompts: text, {"prompt_token_ids": [...]}, a list of token ids, or a list of any of these.
        sampling_params: one for all, or one for each prompt.
        A prompt that cannot be served raises RequestError before anything runs.
        """
        self._check_free()
        prompts = _as_list(prompts)
        params = _one_each(sampling_params, len(prompts))
        requests = []
        for prompt, param in zip(prompts, params):
            try:
                requests.append(self.engine.prepare(prompt, param))
            except RequestError as error:
                where = f"prompt {len(requests)}: " if len(prompts) > 1 else ""
                raise RequestError(f"{where}{error}") from None
        return self._run(requests, self.use_tqdm if use_tqdm is None else use_tqdm)

    def chat(self, messages: Messages | Sequence[Messages],
             sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
             add_generation_prompt: bool = True, date_string: str | None = None,
             use_tqdm: bool | None = None) -> list[RequestOutput]:
        """Answer one conversation or many, rendered with the model's chat template.

        messages: [{"role": "user", "content": "..."}, ...], or a list of such lists.
        date_string: what the template shows as today's date, if it shows one.
        """
        prompts = []
        for conversation in _conversations(messages):
            text = self._render_chat(conversation, add_generation_prompt, date_string)
            prompts.append({"prompt": text, "prompt_token_ids": self._encode_rendered(text)})
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_token_ids(self, messages: Messages, add_generation_prompt: bool = True,
                       date_string: str | None = None) -> list[int]:
        """The token ids of a conversation: exactly one beginning-of-text token, the template's own."""
        return self._encode_rendered(self._render_chat(messages, add_generation_prompt, date_string))

    def _render_chat(self, messages: Messages, add_generation_prompt: bool, date_string: str | None) -> str:
        if self.tokenizer is None:
            raise TokenizerError("chat needs a tokenizer, and this engine was made with skip_tokenizer_init=True")
        return self.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt,
                                          date_string=date_string)

    def _encode_rendered(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template has written the BOS

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt and yield an output after every token: `out.outputs[0].new_text` is what is new.

        Leaving the loop early aborts the request.
        """
        self._check_free()
        if isinstance(prompt, (list, tuple)) and any(isinstance(p, (str, Mapping)) for p in prompt):
            raise RequestError(f"stream() takes one prompt, got {len(prompt)}: use generate() for several")
        with self._lock:
            request_id = self.engine.add_request(prompt, sampling_params)
            self._inbox[request_id] = deque()
        return TokenStream(self, request_id)

    def _step(self) -> None:
        """One engine step, with the lock held; outputs go to whoever waits for them, in this thread or another."""
        self._check_free()
        while self._abandoned:
            self._drop_locked([self._abandoned.popleft()])
        looked_at = "probe" in vars(self)  # whoever looks after a token shall not find the next one there already
        self._route(self.engine.step(ahead=not looked_at))

    @property
    def is_driven_elsewhere(self) -> bool:
        """Whether a LiveEngine steps this, in another thread than the caller's."""
        driver = self._driver and self._driver()
        return driver is not None and driver.state != "closed" and not driver.is_own_thread

    def _check_free(self) -> None:
        """Raise TinyVLLMError if a LiveEngine drives this: two threads that step one engine would ruin it."""
        if self.is_driven_elsewhere:
            raise TinyVLLMError("a LiveEngine drives this LLM: use its add(), chat(), stream() and reset(), or close() "
                                "it first")

    def _settle(self) -> None:
        """End a step that has been begun ahead, for who wants to look; its outputs come with the next one.

        Not beside a LiveEngine: that would be two threads that step one engine.
        """
        if not self.is_driven_elsewhere:
            self.engine.settle()

    def _check_present(self, request_id: str) -> None:
        if not self.engine.has_request(request_id):
            raise TinyVLLMError(f"request {request_id} ended without anybody taking its outputs: llm.engine was used "
                                "directly, or reset, while a call of this LLM was waiting")

    def _route(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._inbox:
                self._inbox[output.request_id].append(output)
            elif output.finished and output.request_id in self._awaited:
                self._awaited[output.request_id] = output

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        request_ids = [request.request_id for request in requests]
        left = set(request_ids)
        try:
            with self._lock:
                self._awaited.update(dict.fromkeys(request_ids))
                for request in requests:
                    self.engine.submit(request)
            with tqdm(total=len(request_ids), desc="requests", unit="request", disable=not use_tqdm,
                      leave=False) as bar, no_whole_collections():
                while left:
                    with self._lock:  # released between steps: several threads take turns, and serve each other
                        done = {request_id for request_id in left if self._awaited[request_id] is not None}
                        if not done:
                            self._check_present(next(iter(left)))
                            self._step()
                    left -= done
                    bar.update(len(done))
            return [self._awaited[request_id] for request_id in request_ids]
        finally:  # an interrupt or an error must not leave requests behind that a later call would have to run
            self._drop(left)
            for request_id in request_ids:
                self._awaited.pop(request_id, None)

    def _drop(self, request_ids: Iterable[str]) -> None:
        """Abort requests that nobody waits for any more; "abort" outputs of others go to their streams."""
        with self._lock:
            self._drop_locked(request_ids)

    def _drop_locked(self, request_ids: Iterable[str]) -> None:
        dropped = set(request_ids)
        self.engine.abort(dropped)
        self._route(output for output in self.engine.take_pending() if output.request_id not in dropped)


class TokenStream(Iterator[RequestOutput]):
    """The outputs of one request as they come: what LLM.stream returns. Dropping it, or `close`, aborts the request."""

    def __init__(self, llm: LLM, request_id: str):
        self.request_id = request_id
        self._llm, self._outputs, self._finished = llm, llm._inbox[request_id], False

    def __next__(self) -> RequestOutput:
        if self._finished:
            raise StopIteration
        try:
            while not self._outputs:
                with self._llm._lock:
                    if not self._outputs:
                        self._llm._check_present(self.request_id)
                        self._llm._step()
        except BaseException:
            self.close()
            raise
        output = self._outputs.popleft()
        if output.finished:
            self.close()
        return output

    def close(self) -> None:
        """Abort the request if it is still running."""
        if not self._finished:
            self._finished = True
            self._llm._inbox.pop(self.request_id, None)
            self._llm._drop([self.request_id])

    def __del__(self):
        if getattr(self, "_finished", True):
            return
        self._llm._inbox.pop(self.request_id, None)
        # This may run anywhere, even in the middle of a step: then only leave word, and the next step sees to it.
        if self._llm._lock.acquire(blocking=False):
            try:
                self._llm._drop_locked([self.request_id])
            finally:
                self._llm._lock.release()
        else:
            self._llm._abandoned.append(self.request_id)


def _as_list(prompts: Any) -> list[Any]:
    """What generate() was given, as a list of prompts: one prompt in any of its forms is a list of one."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        return [prompts]
    if getattr(prompts, "ndim", 1) == 0:
        return [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(p, numbers.Integral) for p in prompts):
        return [prompts]  # one prompt, as token ids
    return prompts


def _conversations(messages: Any) -> list[Messages]:
    """What chat() was given, as a list of conversations. Raises RequestError for what is neither."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
    if not is_list or not messages or isinstance(messages[0], Mapping):
        return [check_messages(messages)]
    checked = []
    for i, conversation in enumerate(messages):
        try:
            checked.append(check_messages(conversation))
        except RequestError as error:
            raise RequestError(f"conversation {i}: {error}") from None
    return checked


def _one_each(params: Any, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    params = list(params)
    if len(params) != count:
        raise RequestError(f"{count} prompts and {len(params)} sampling parameters: give one for all, or one for each")
    return params
