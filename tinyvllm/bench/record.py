"""Records runs of a GPU at the Llama-3.2-1B shape, for the notebooks: a class without a GPU sees a big machine at work.

    python -m tinyvllm.bench.record FOLDER         writes h200_*.jsonl.gz there (named after the GPU)

The weights are random, so the tokens mean nothing and no text is kept; times, batches and blocks are those of the run.

    continuous    96 requests arriving at random, 64 to 512 tokens in, 32 to 256 out; all begin with the same 64 tokens
    static        the very same arrivals under static batching
    tight         the same with a pool that is too small: preemptions
    anatomy       eight requests; some steps of prefill and of decode are taken apart, operation by operation
"""

import argparse
import time
from functools import partial
from pathlib import Path

from tinyvllm import SamplingParams
from tinyvllm.bench.ceilings import ceilings
from tinyvllm.bench.cpu import LLAMA_3_2_1B
from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.gpu import BLOCK_SIZE, MAX_MODEL_LEN, Bench
from tinyvllm.engine.arrivals import poisson_arrivals, prompt_of
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.llm_engine import LLMEngine
from tinyvllm.engine.trace import Trace
from tinyvllm.kernels.cuda_support import device_name, require_cuda
from tinyvllm.probe.profiler import StepProfile, StepProfiler

SEATS, ROOMY, TIGHT = 32, 1536, 420
BUDGET = 512  # tokens a step
RUNS = {"continuous": ("continuous", ROOMY), "static": ("static", ROOMY), "tight": ("continuous", TIGHT),
        "anatomy": ("continuous", ROOMY)}  # name -> (policy, blocks)
PROFILED_STEPS = (1, 2, 12, 20, 40, 60)  # of the run "anatomy"


def arrivals():
    """The traffic of every run: about a second of requests."""
    return poisson_arrivals(96, 90.0, prompt_tokens=(64, 512), output_tokens=(32, 256), num_shared_tokens=64, seed=7)


def record(bench: Bench, policy: str, num_blocks: int, requests: list,
           profiled: tuple[int, ...] = ()) -> list:
    """Serve the arrivals by the clock; returns the events. A first pass, not recorded, captures graphs.

    profiled: numbers of steps to take apart; these alone take longer than they would.
    """
    for log in (None, EventLog(10**6)):
        engine = LLMEngine(bench.runner, vocab_size=bench.config.vocab_size, eos_token_ids=bench.config.eos_token_ids,
                           num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN,
                           max_num_seqs=SEATS, max_num_batched_tokens=BUDGET, scheduling_policy=policy)
        if log is not None:
            engine.listen(log)
        vocabulary = range(bench.config.vocab_size - 256)  # without the special tokens
        waiting = [(arrival, prompt_of(arrival, vocabulary, i)) for i, arrival in enumerate(requests)]
        start = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            while waiting and waiting[0][0].at <= time.perf_counter() - start:
                arrival, prompt = waiting.pop(0)
                engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=arrival.num_output_tokens,
                                                          ignore_eos=True))
            if engine.num_steps + 1 in profiled:
                bench.runner.profiler = StepProfiler(bench.config, bench.backend, partial(emit_profile, log))
            if engine.has_unfinished_requests():
                engine.step(ahead=not {engine.num_steps + 1, engine.num_steps + 2} & set(profiled))
    return log.read()[0]


def emit_profile(log: EventLog | None, profile: StepProfile) -> None:
    """As Probe.profile_next_step does, with the roofs of this GPU."""
    roofs = ceilings("cuda")  # measured once, in the pass that is not recorded
    if log is not None:
        log.emit("step_profiled", None, profile.operations, {**profile.about, "ceilings": roofs._asdict()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyvllm.bench.record", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help=f"some of {','.join(RUNS)}")
    options = parser.parse_args(argv)
    chosen = options.only.split(",") if options.only else list(RUNS)
    unknown = sorted(set(chosen) - set(RUNS))
    if unknown:
        parser.error(f"--only takes {', '.join(RUNS)}, not {', '.join(unknown)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    require_cuda()
    bench, requests, gpu = Bench(LLAMA_3_2_1B), arrivals(), device_name()
    about = {"model": "random weights in the shape of Llama-3.2-1B", "device": "cuda", "gpu": gpu,
             "environment": describe_environment("numba-cuda", "cuda-bindings"),
             "command": "python -m tinyvllm.bench.record FOLDER"}
    for name in chosen:
        how = RUNS[name]
        if name == "anatomy":
            events = record(bench, *how, [a._replace(at=0.0) for a in requests[:8]], PROFILED_STEPS)
        else:
            events = record(bench, *how, requests)
        trace = Trace(events, {**about, "run": name})
        path = trace.save(options.folder / f"{gpu.split()[-1].lower()}_{name}.jsonl.gz", prompt_ids=False)
        steps = trace.events[-1].step
        print(f"{path}: {len(trace)} events, {steps} steps in {trace.duration_s:.2f} s, "
              f"{path.stat().st_size / 1024:.0f} KiB", flush=True)


if __name__ == "__main__":
    main()
