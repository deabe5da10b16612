"""The `tinyvllm` command: generate, chat, demo, inspect."""

import argparse
import sys
from collections.abc import Sequence

from tinyvllm import __version__
from tinyvllm.errors import ConfigError, TinyVLLMError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 2 for an error in the user's words, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of ending the program
    try:
        return arguments.run(arguments) or 0
    except TinyVLLMError as error:
        print(f"tinyvllm {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has had enough
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tinyvllm", description="An LLM inference engine you can see inside.")
    parser.add_argument("--version", action="version", version=f"tinyvllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue one or more prompts")
    generate.add_argument("prompt", nargs="+", help="text to continue; several run as one batch")
    _add_model(generate)
    _add_sampling(generate, max_tokens=128)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model in the terminal")
    chat.add_argument("--system", help="a system message at the start of the conversation")
    _add_model(chat)
    _add_sampling(chat, max_tokens=400)
    chat.set_defaults(run=_chat)

    demo = commands.add_parser("demo", help="eight prompts under continuous batching, watched live")
    demo.add_argument("--plain", action="store_true", help="no live view: print completions and the summary only")
    demo.add_argument("--speed", type=float, metavar="N", help="at most N steps a second, to follow it by eye")
    # Few seats and a small pool, so that there is something to see: waiting, sharing, now and then a preemption.
    _add_model(demo, max_num_seqs=4, block_size=8, num_blocks=96)
    demo.set_defaults(run=_demo)

    inspect = commands.add_parser("inspect", help="tensors, dtypes, sizes and the memory plan of a model")
    inspect.add_argument("model", nargs="?", default="demo", help="model folder, hub id in the local cache, or 'demo'")
    inspect.add_argument("--block-size", type=int, default=16, help="tokens a KV-cache block (default %(default)s)")
    inspect.add_argument("--memory", type=float, metavar="GIB", help="plan for a device with this much memory")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_model(parser: argparse.ArgumentParser, **defaults) -> None:
    group = parser.add_argument_group("engine")
    options = {**dict(model="demo", device="auto", max_model_len=None, max_num_seqs=None, max_num_batched_tokens=None,
                      block_size=16, num_blocks=None, gpu_memory_utilization=0.9, seed=0,
                      scheduling_policy="continuous"), **defaults}

    def add(name: str, kind, text: str, **extra):
        shown = "chosen by the engine" if options[name] is None else options[name]
        group.add_argument("--" + name.replace("_", "-"), type=kind, default=options[name],
                           help=f"{text} (default: {shown})", **extra)

    add("model", str, "model folder, hub id in the local cache, or 'demo', the embedded model")
    add("device", str, "auto, cuda or cpu")
    add("max_model_len", int, "most tokens of one request", metavar="N")
    add("max_num_seqs", int, "most requests in one step", metavar="N")
    add("max_num_batched_tokens", int, "most tokens in one step", metavar="N")
    add("block_size", int, "tokens a KV-cache block", metavar="N")
    add("num_blocks", int, "blocks in the KV cache", metavar="N")
    add("gpu_memory_utilization", float, "share of the GPU's memory to use", metavar="X")
    add("scheduling_policy", str, "continuous or static batching")
    add("seed", int, "seed of the draws", metavar="N")
    group.add_argument("--no-prefix-caching", dest="enable_prefix_caching", action="store_false",
                       help="do not share the blocks of equal prefixes")
    group.add_argument("--no-kv-cache", dest="use_kv_cache", action="store_false",
                       help="recompute every sequence at each step, for comparison")
    group.add_argument("--enforce-eager", action="store_true", help="call the operations one by one from Python")
    group.add_argument("--batch-invariant", action="store_true",
                       help="the same bits for a request whoever else is served (slower on a GPU)")


ENGINE_OPTIONS = ("device", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks",
                  "gpu_memory_utilization", "scheduling_policy", "seed", "enable_prefix_caching", "use_kv_cache",
                  "enforce_eager", "batch_invariant")


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N most likely tokens")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="keep tokens up to this probability")
    group.add_argument("--sampling-seed", type=int, metavar="N", help="make this request's draws repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; may be given again")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N",
                       help="most tokens to generate (default: %(default)s)")


def _make_llm(arguments: argparse.Namespace):
    from tinyvllm.llm import LLM

    options = {name: getattr(arguments, name) for name in ENGINE_OPTIONS}
    if not options["use_kv_cache"]:
        options["enable_prefix_caching"] = False
    return LLM(arguments.model, **options, use_tqdm=sys.stderr.isatty())


def _sampling(arguments: argparse.Namespace):
    from tinyvllm.sampling_params import SamplingParams

    return SamplingParams(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
                          seed=arguments.sampling_seed, stop=arguments.stop, ignore_eos=arguments.ignore_eos,
                          max_tokens=arguments.max_tokens)


def _generate(arguments: argparse.Namespace) -> None:
    params = _sampling(arguments)
    llm = _make_llm(arguments)
    if len(arguments.prompt) == 1:
        stream = llm.stream(arguments.prompt[0], params)  # refuses a bad prompt before anything is printed
        print(arguments.prompt[0], end="", flush=True)
        for output in stream:
            print(output.outputs[0].new_text, end="", flush=True)
        print()
        return
    for output in llm.generate(arguments.prompt, params):
        print(f"--- {output.prompt}\n{output.outputs[0].text}\n")


def _chat(arguments: argparse.Namespace) -> None:
    params = _sampling(arguments)
    llm = _make_llm(arguments)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    llm.chat_token_ids([*opening, {"role": "user", "content": "hello"}])  # a model that cannot chat says so now
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"Say something. {CHAT_COMMANDS}")
    messages = list(opening)
    while True:
        try:
            line = input("you> " if interactive else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(f"There is no command {line.split()[0]}. {CHAT_COMMANDS}")
        elif line:
            _answer(llm, messages, line, params)
            print("\n" if interactive else "", flush=True)


CHAT_COMMANDS = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer."


def _answer(llm, messages: list[dict[str, str]], line: str, params) -> None:
    """One turn: print the answer as it comes, and add both sides to the conversation."""
    turn = [*messages, {"role": "user", "content": line}]
    try:
        token_ids = llm.chat_token_ids(turn)
        if len(messages) > 1 and len(token_ids) >= llm.memory_plan.max_model_len:
            print(f"(the conversation is full: {len(token_ids)} tokens of {llm.memory_plan.max_model_len}; "
                  "say /reset to begin a new one)", end="")
            return
        text, stream = "", llm.stream(token_ids, params)
        try:
            for output in stream:
                print(output.outputs[0].new_text, end="", flush=True)
                text = output.outputs[0].text
        except KeyboardInterrupt:  # ends the answer, not the conversation
            stream.close()
            print(" (stopped)", end="")
    except TinyVLLMError as error:  # this turn is lost, the conversation is not
        print(f"(not answered: {error})", end="")
        return
    messages[:] = [*turn, {"role": "assistant", "content": text}]


def _demo(arguments: argparse.Namespace) -> None:
    from tinyvllm.demo.show import run_demo

    run_demo(lambda: _make_llm(arguments), live=not arguments.plain, steps_per_second=arguments.speed)


def _inspect(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from tinyvllm.inspect import inspect_model
    from tinyvllm.loader.resolve import resolve_model

    memory = arguments.memory
    if memory is not None:
        if not 0 <= memory < 2**20:
            raise ConfigError(f"--memory must be a number of GiB, 0 or more, got {memory}")
        memory = int(memory * 2**30)
    report = inspect_model(resolve_model(arguments.model), block_size=arguments.block_size, memory=memory)
    if sys.stdout.isatty():
        Console().print(report)
    else:  # whole lines for files and pipes, whatever the width
        print(report.text())


if __name__ == "__main__":
    sys.exit(main())
