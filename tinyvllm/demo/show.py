"""`tinyvllm demo`: eight prompts through the whole engine, watched live in the terminal."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinyvllm.errors import ConfigError, TokenizerError
from tinyvllm.outputs import EngineStats, RequestOutput
from tinyvllm.sampling_params import SamplingParams

PROMPTS = (
    "Tell me a story about a fox and a lantern.",
    "Tell me a story about a small dragon and a silver key.",
    "Tell me a story about an old fisherman and a bell.",
    "Tell me a story about a brave mouse and a rope.",
    "Tell me a story about a robot and an umbrella.",
    "Tell me a story about a girl named Zarina and a telescope.",
    "Repeat after me: the river runs under the old stone bridge.",
    "Tell me a story about a fox and a drum.",
)
MAX_TOKENS = 320
FRAMES_PER_SECOND = 15
COLOURS = {"waiting": "grey50", "prefill": "orange3", "decode": "sky_blue2", "preempted": "red3",
           "stop": "green4", "length": "green4", "abort": "red3"}


@dataclass
class Row:
    """One request as the view shows it."""

    prompt: str
    state: str = "waiting"
    text: str = ""
    num_tokens: int = 0
    output: RequestOutput | None = None


def run_demo(make_llm: Callable, live: bool = True, steps_per_second: float | None = None,
             console: Console | None = None) -> list[RequestOutput]:
    """Load a model with make_llm(), run PROMPTS through it, print completions and a summary; returns the outputs.

    live: show the running engine, where the output is a terminal. steps_per_second: slow it down for the eye.
    """
    if steps_per_second is not None and not steps_per_second > 0:
        raise ConfigError(f"--speed must be a number of steps a second above 0, got {steps_per_second}")
    console = console or Console()
    start = time.perf_counter()
    console.print("Loading the model (the first time, its kernels are compiled: up to half a minute) ...")
    llm = make_llm()
    if llm.tokenizer is None or not llm.tokenizer.chat_template:
        raise TokenizerError(f"the demo chats, and {llm.model_path} has no chat template: "
                             "use `tinyvllm generate` with this model")
    loaded = time.perf_counter()
    # One token first: whatever has to be compiled is compiled now, and does not pass for the engine's speed.
    one_token = SamplingParams(temperature=0.8, seed=0, max_tokens=1)
    llm.chat([{"role": "user", "content": "Hello!"}], one_token, use_tqdm=False)
    first_token = ready = time.perf_counter()
    before = llm.engine.stats
    rows: dict[str, Row] = {}
    for i, prompt in enumerate(PROMPTS):
        token_ids = llm.chat_token_ids([{"role": "user", "content": prompt}])
        # Sampled, so that eight fables are eight different ones; seeded, so that everybody sees the same.
        params = SamplingParams(temperature=0.8, seed=i, max_tokens=MAX_TOKENS)
        rows[llm.engine.add_request(token_ids, params)] = Row(prompt)

    show_live = live and console.is_terminal
    view = Live(console=console, auto_refresh=False, transient=True) if show_live else None
    next_frame = 0.0
    if view:
        view.start()
    try:
        while llm.engine.has_unfinished_requests():
            if steps_per_second:
                due = ready + (llm.engine.num_steps - before.num_steps) / steps_per_second
                time.sleep(max(0.0, due - time.perf_counter()))
            for output in llm.engine.step(ahead=True):
                row = rows[output.request_id]
                row.output, row.text = output, output.outputs[0].text
                row.num_tokens = len(output.outputs[0].token_ids)
            now = time.perf_counter()
            if view and now >= next_frame:
                _update_states(rows, llm.engine.stats)
                view.update(_frame(rows, llm.engine.stats, now - ready), refresh=True)
                next_frame = time.perf_counter() + 1 / FRAMES_PER_SECOND
    finally:
        if view:
            view.stop()
    done = time.perf_counter()

    for row in rows.values():
        console.print(Panel(Text(row.text.strip()), title=Text(row.prompt, style="bold"), title_align="left",
                            border_style="grey50"))
    outputs = [row.output for row in rows.values()]
    console.print(summary(outputs, before, llm.engine.stats, load_s=loaded - start, first_token_s=first_token - start,
                          generate_s=done - ready, device=llm.device))
    return outputs


def _update_states(rows: dict[str, Row], stats: EngineStats) -> None:
    running, waiting = set(stats.running), set(stats.waiting)
    for request_id, row in rows.items():
        if row.output is not None and row.output.finished:
            row.state = row.output.outputs[0].finish_reason
        elif request_id in running:
            row.state = "decode" if row.num_tokens else "prefill"
        elif request_id in waiting:
            row.state = "preempted" if row.num_tokens else "waiting"


def _frame(rows: dict[str, Row], stats: EngineStats, elapsed: float) -> Group:
    table = Table(expand=True, box=None, pad_edge=False)
    table.add_column("request", width=7, justify="right")
    table.add_column("state", width=9)
    table.add_column("tokens", width=6, justify="right")
    table.add_column("text", no_wrap=True, ratio=1)
    width = max(20, Console().width - 30)
    for request_id, row in rows.items():
        text = " ".join((row.text or row.prompt).split())
        tail = text if len(text) <= width else "… " + text[-(width - 2):]
        table.add_row(request_id, Text(row.state, style=COLOURS[row.state]), str(row.num_tokens),
                      Text(tail, style="" if row.text else "grey50"))
    counters = Table.grid(padding=(0, 2))
    rate = stats.num_output_tokens / elapsed if elapsed else 0.0
    counters.add_row("KV cache", ProgressBar(total=stats.num_blocks, completed=stats.num_blocks - stats.num_free_blocks,
                                             width=24),
                     f"{stats.num_blocks - stats.num_free_blocks} of {stats.num_blocks} blocks",
                     f"running {stats.num_running}", f"waiting {stats.num_waiting}", f"step {stats.num_steps}",
                     f"{rate:,.0f} tokens/s")
    return Group(table, Text(), counters)


def summary(outputs: list[RequestOutput], before: EngineStats, after: EngineStats, *, load_s: float,
            first_token_s: float, generate_s: float, device: str) -> Table:
    """The figures of a run, as a table. before, after: the engine's counters around it."""
    num_tokens = after.num_output_tokens - before.num_output_tokens
    table = Table(title="Summary", title_justify="left", show_header=False)
    ttft = sorted(output.metrics.ttft for output in outputs)
    tpot = [output.metrics.tpot for output in outputs if output.metrics.tpot is not None]

    def add(name: str, value: str) -> None:
        table.add_row(name, value)

    add("device", device)
    add("first token after start", f"{first_token_s:.2f} s (loading {load_s:.2f} s, the rest compiling, if needed)")
    add("requests", f"{len(outputs)} in {generate_s:.2f} s, {after.num_steps - before.num_steps} steps")
    add("output", f"{num_tokens} tokens, {num_tokens / generate_s:,.0f} tokens/s")
    add("TTFT (time to first token)", f"median {statistics.median(ttft) * 1e3:.1f} ms, worst {ttft[-1] * 1e3:.1f} ms")
    if tpot:
        add("TPOT (time per output token)", f"median {statistics.median(tpot) * 1e3:.2f} ms")
    add("prefix cache", f"{after.prefix_cache_hits - before.prefix_cache_hits} of "
                        f"{after.prefix_cache_queries - before.prefix_cache_queries} prompt tokens found")
    add("preemptions", str(after.num_preemptions - before.num_preemptions))
    return table


if __name__ == "__main__":
    from tinyvllm.cli import main

    sys.exit(main(["demo", *sys.argv[1:]]))
