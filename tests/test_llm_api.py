"""LLM: the public API, in the shape of vLLM's offline class."""

import threading

import numpy as np
import pytest

from tests.model_files import special_token_ids, write_tiny_model
from tinyvllm import LLM, SamplingParams
from tinyvllm.errors import ConfigError, DeviceError, ModelNotFoundError, RequestError, TinyVLLMError, TokenizerError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def text_of(output):
    return output.outputs[0].text


def test_generate_takes_text_lists_token_ids_and_dictionaries(llm):
    text = "The fox found a lantern."
    ids = llm.tokenizer.encode_prompt(text)
    single = llm.generate(text, GREEDY)
    assert len(single) == 1 and single[0].prompt == text and single[0].prompt_token_ids == ids
    assert single[0].finished and single[0].outputs[0].finish_reason == "length"
    assert len(single[0].outputs[0].token_ids) == 12
    as_ids = llm.generate(ids, GREEDY)
    mixed = llm.generate([text, {"prompt_token_ids": ids}, ids, {"prompt": text}], GREEDY)
    assert [text_of(o) for o in as_ids + mixed] == [text_of(single[0])] * 5
    assert mixed[1].prompt is None


def test_outputs_keep_the_order_of_the_prompts_and_their_own_parameters(llm):
    prompts = [f"Prompt number {i}" for i in range(6)]
    params = [SamplingParams(temperature=0, max_tokens=12 - 2 * i, ignore_eos=True) for i in range(6)]
    outputs = llm.generate(prompts, params)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [12, 10, 8, 6, 4, 2]


def test_stream_pieces_make_up_the_final_text(llm):
    pieces, last = [], None
    for last in llm.stream("The river", GREEDY):
        pieces.append(last.outputs[0].new_text)
    assert "".join(pieces) == text_of(last) == text_of(llm.generate("The river", GREEDY)[0])
    assert last.finished and last.metrics.ttft > 0 and last.metrics.tpot > 0


def test_leaving_a_stream_early_aborts_its_request(llm):
    for _ in llm.stream("The river", GREEDY):
        break
    assert llm.engine.stats.num_running == llm.engine.stats.num_waiting == 0
    assert llm.engine.stats.num_free_blocks == llm.engine.stats.num_blocks


def test_a_stream_survives_a_generate_in_its_middle(llm):
    alone = text_of(llm.generate("The river", GREEDY)[0])
    pieces = []
    for i, output in enumerate(llm.stream("The river", GREEDY)):
        pieces.append(output.outputs[0].new_text)
        if i == 2:
            llm.generate(["Another one", "and one more"], GREEDY)
    assert "".join(pieces) == alone


def test_chat_renders_the_template_with_one_beginning_of_text(llm):
    messages = [{"role": "user", "content": "Tell me a story."}]
    bos = special_token_ids()["<|begin_of_text|>"]
    one, = llm.chat(messages, GREEDY, date_string="1 Jan 2026")
    assert one.prompt_token_ids.count(bos) == 1 and one.prompt_token_ids[0] == bos
    two = llm.chat([messages, messages], GREEDY, date_string="1 Jan 2026")
    assert [text_of(o) for o in two] == [text_of(one)] * 2
    other, = llm.chat(messages, GREEDY, date_string="2 Jan 2026")
    assert other.prompt_token_ids != one.prompt_token_ids


def test_a_templated_string_given_to_generate_gets_no_second_bos(llm):
    bos = special_token_ids()["<|begin_of_text|>"]
    output, = llm.generate("<|begin_of_text|>hello", GREEDY)
    assert output.prompt_token_ids.count(bos) == 1


@pytest.mark.parametrize("name", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
def test_each_eos_id_of_generation_config_ends_a_request_also_as_first_token(make_llm, name):
    """The model is made to say that token: its logits buffer is overwritten before the choice."""
    eos = special_token_ids()[name]
    llm = make_llm()
    argmax = llm.runner.backend.argmax

    def force(out, logits):
        argmax(out, logits)
        out[:] = eos

    llm.runner.backend.argmax = force
    output = llm.generate("hello", SamplingParams(temperature=0, max_tokens=5))[0].outputs[0]
    assert output.token_ids == [eos] and output.finish_reason == "stop" and output.text == ""


def test_stop_strings_end_the_text_and_are_cut_off(llm):
    full = text_of(llm.generate("The river", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))[0])
    assert len(full) > 12
    stop = full[6:10]
    output = llm.generate("The river", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop))[0]
    assert output.outputs[0].text == full[:full.index(stop)]
    assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason == stop
    assert len(output.outputs[0].token_ids) < 40


def test_seeded_sampling_is_the_same_alone_in_a_batch_shuffled_and_preempted(llm, make_llm):
    def sample(engine, names, **extra):
        prompts = {n: f"Prompt number {n}" for n in names}
        params = [SamplingParams(temperature=1.3, top_k=50, top_p=0.95, seed=n, max_tokens=24, ignore_eos=True)
                  for n in names]
        return {n: o.outputs[0].token_ids for n, o in zip(names, engine.generate(list(prompts.values()), params))}

    together = sample(llm, [0, 1, 2, 3, 4, 5])
    assert sample(llm, [5, 2, 0, 4, 1, 3]) == together
    assert {n: sample(llm, [n])[n] for n in together} == together
    tiny = make_llm(num_blocks=6, max_num_batched_tokens=20)
    assert sample(tiny, [0, 1, 2, 3, 4, 5]) == together
    assert tiny.engine.stats.num_preemptions > 0
    assert len({tuple(ids) for ids in together.values()}) == 6


def test_unseeded_requests_differ_and_depend_on_the_engine_seed(make_llm):
    def sample(seed):
        outputs = make_llm(seed=seed).generate(["same prompt"] * 3, SamplingParams(temperature=1.0, max_tokens=16))
        return [tuple(o.outputs[0].token_ids) for o in outputs]

    first = sample(1)
    assert first == sample(1) and first != sample(2) and len(set(first)) == 3


@pytest.mark.parametrize("options", [dict(temperature=0.3), dict(top_k=2), dict(top_p=0.2), dict(seed=8),
                                     dict(stop_token_ids=list(range(200))), dict(max_tokens=3)])
def test_every_accepted_sampling_field_changes_the_output(llm, options):
    base = dict(temperature=1.5, seed=7, max_tokens=24, ignore_eos=True)
    a = llm.generate("The river", SamplingParams(**base))[0].outputs[0].token_ids
    b = llm.generate("The river", SamplingParams(**{**base, **options}))[0].outputs[0].token_ids
    assert a != b


@pytest.mark.parametrize("options", [
    dict(max_num_batched_tokens=16), dict(max_num_batched_tokens=17, max_num_seqs=3), dict(num_blocks=7),
    dict(block_size=5, num_blocks=400), dict(block_size=512, num_blocks=16), dict(enable_prefix_caching=False),
    dict(scheduling_policy="static", max_num_seqs=2), dict(use_kv_cache=False, enable_prefix_caching=False),
    dict(enforce_eager=True)], ids=str)
def test_greedy_tokens_are_bitwise_the_same_under_every_engine_option(llm, make_llm, options):
    prompts = [f"The {w} went over the bridge and" for w in ("fox", "owl", "heron", "mouse", "otter")] * 2
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    want = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    other = make_llm(**{"max_num_seqs": 8, **options})
    assert [o.outputs[0].token_ids for o in other.generate(prompts, params)] == want
    other.engine.kv_cache_manager.check()


def test_prefix_hits_are_reported(make_llm):
    llm = make_llm()
    prompt = "The fox and the owl went over the old bridge in the rain. " * 3
    first, = llm.generate(prompt, GREEDY)
    second, = llm.generate(prompt + "Then", GREEDY)
    assert first.num_cached_tokens == 0 and second.num_cached_tokens >= 16
    assert llm.engine.stats.prefix_cache_hits == second.num_cached_tokens


def test_a_bad_prompt_in_a_batch_names_its_place_and_leaves_nothing_behind(llm):
    with pytest.raises(RequestError, match="prompt 1: the prompt is empty"):
        llm.generate(["fine", "", "fine"], GREEDY)
    with pytest.raises(RequestError, match="token id 384 is out of range"):
        llm.generate([[1, 384]], GREEDY)
    with pytest.raises(RequestError, match="2 prompts and 3 sampling parameters"):
        llm.generate(["a", "b"], [GREEDY] * 3)
    assert llm.engine.stats.num_waiting == 0
    assert len(llm.generate("fine", GREEDY)[0].outputs[0].token_ids) == 12


def test_too_long_prompts(make_llm):
    llm = make_llm(max_model_len=32)
    with pytest.raises(RequestError, match="the prompt has 40 tokens, and max_model_len=32"):
        llm.generate([[1] * 40], GREEDY)
    llm = make_llm(num_blocks=2)
    with pytest.raises(RequestError, match=r"40 tokens and the whole KV cache holds 32 \(2 blocks of 16\)"):
        llm.generate([[1] * 40], GREEDY)


@pytest.mark.parametrize("options, message", [
    (dict(max_modle_len=5), "no option 'max_modle_len'; did you mean 'max_model_len'"),
    (dict(tensor_parallel_size=2), "no option 'tensor_parallel_size'"),
    (dict(device="tpu"), "device must be one of 'auto', 'cuda', 'cpu', got 'tpu'"),
    (dict(block_size=0), "block_size must be a whole number of 1 or more, got 0"),
    (dict(num_blocks=-1), "num_blocks must be"),
    (dict(max_num_seqs=1.5), "max_num_seqs must be"),
    (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization must be above 0 and at most 1, got 1.5"),
    (dict(scheduling_policy="fifo"), "scheduling_policy must be one of 'continuous', 'static'"),
    (dict(max_model_len=10**6), "max_model_len=1000000 is more than the model's max_position_embeddings=512"),
    (dict(max_num_seqs=300, max_num_batched_tokens=100), "max_num_batched_tokens=100 is less than max_num_seqs=300"),
    (dict(use_kv_cache=False), "set enable_prefix_caching=False"),
])
def test_engine_options_are_checked_in_plain_words(make_llm, options, message):
    with pytest.raises(ConfigError, match=message):
        make_llm(**options)


def test_memory_that_does_not_fit_is_refused_with_its_numbers(make_llm):
    with pytest.raises(TinyVLLMError, match=r"does not fit in memory: weights .* KiB.*100000000 KV-cache blocks.*762.94 GiB.*free"):
        make_llm(num_blocks=100_000_000)


def test_no_gpu_with_device_cuda(tiny_model):
    try:
        from tinyvllm.kernels.cuda_support import require_cuda

        require_cuda()
    except DeviceError:
        with pytest.raises(DeviceError, match=r'device="cuda" needs .*Use device="cpu", which needs no GPU'):
            LLM(tiny_model, device="cuda")
    else:
        pytest.skip("this machine has a GPU")


def test_model_without_tokenizer(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises((TokenizerError, ModelNotFoundError), match="tokenizer.json"):
        LLM(folder, device="cpu", use_tqdm=False)
    llm = LLM(folder, device="cpu", use_tqdm=False, skip_tokenizer_init=True, num_blocks=64)
    output, = llm.generate([[1, 2, 3]], GREEDY)
    assert len(output.outputs[0].token_ids) == 12 and output.outputs[0].text == ""
    with pytest.raises(TokenizerError, match="skip_tokenizer_init"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_one_engine_after_another_in_one_process(make_llm):
    a, b = make_llm(), make_llm(block_size=8)
    assert text_of(a.generate("The river", GREEDY)[0]) == text_of(b.generate("The river", GREEDY)[0])


def test_two_threads_may_share_one_llm(llm):
    prompts = {n: [f"Thread {n} says {i}" for i in range(6)] for n in range(3)}
    want = {n: [text_of(o) for o in llm.generate(prompts[n], GREEDY)] for n in prompts}
    got, errors = {}, []

    def use(n):
        try:
            got[n] = [text_of(o) for o in llm.generate(prompts[n], GREEDY)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors and got == want and not llm._awaited


def test_a_stream_that_is_let_go_of_unread_costs_nothing(make_llm):
    llm = make_llm()
    for _ in range(20):
        llm.stream("The river", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    llm.generate("The fox", GREEDY)
    assert llm.engine.num_steps <= 13 and not llm._inbox
    assert llm.engine.stats.num_free_blocks == llm.engine.stats.num_blocks


def test_an_extreme_but_accepted_parameter_disturbs_nobody(llm):
    want = text_of(llm.generate("The river", GREEDY)[0])
    wild = [SamplingParams(temperature=3e38, top_k=10**12, top_p=1e-300, seed=-5, max_tokens=4),
            SamplingParams(temperature=1e-300, seed=2**70, max_tokens=10**9, stop_token_ids=[0])]
    outputs = llm.generate(["The river", "wild", "wilder"], [GREEDY, *wild])
    assert text_of(outputs[0]) == want and all(o.finished for o in outputs)


def test_bad_sampling_parameters_beside_a_running_request(llm):
    stream = llm.stream("The river", GREEDY)
    first = next(stream).outputs[0].new_text
    with pytest.raises(RequestError):
        llm.generate("The fox", SamplingParams(stop_token_ids=[10**6]))
    with pytest.raises(RequestError):
        llm.generate("The fox", {"temperature": 0})
    assert first + "".join(o.outputs[0].new_text for o in stream) == text_of(llm.generate("The river", GREEDY)[0])


@pytest.mark.parametrize("messages, message", [
    ({"role": "user", "content": "hi"}, "messages must be a list"), (None, "messages must be a list"),
    ("hi", "messages must be a list"), ([], "messages is empty"),
    ([[{"role": "user", "content": "hi"}], [{"role": "usr", "content": "hi"}]], "conversation 1: message 0.*'usr'"),
])
def test_chat_refuses_other_shapes_in_plain_words(llm, messages, message):
    with pytest.raises(RequestError, match=message):
        llm.chat(messages, GREEDY)


def test_prompts_as_numpy_arrays_tuples_and_generators(llm):
    ids = [5, 6, 7]
    want = text_of(llm.generate([ids], GREEDY)[0])
    for prompt in (np.array(ids), [np.array(ids)], np.array([ids]), tuple(ids), {"prompt_token_ids": np.array(ids)},
                   (i for i in ids), [{"prompt": "shown", "prompt_token_ids": ids}]):
        assert [text_of(o) for o in llm.generate(prompt, GREEDY)] == [want]
    assert llm.generate({"prompt": "shown", "prompt_token_ids": ids}, GREEDY)[0].prompt == "shown"
    for bad in (b"abc", 5, np.array(3), [np.array([1.5])], [[True]]):
        with pytest.raises(RequestError, match="a prompt is text, a list of token ids"):
            llm.generate(bad, GREEDY)
    with pytest.raises(RequestError, match="stream\\(\\) takes one prompt, got 2"):
        llm.stream(["a", "b"], GREEDY)


def test_an_interrupt_leaves_nothing_behind(llm):
    execute, calls = llm.runner.execute, []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return execute(batch)

    llm.runner.execute = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["The river", "The fox"], GREEDY)
    finally:
        llm.runner.execute = execute
    assert llm.engine.stats.num_running == llm.engine.stats.num_waiting == 0
    assert llm.engine.stats.num_free_blocks == llm.engine.stats.num_blocks
    assert llm.generate("The river", GREEDY)[0].finished


def test_reset_changes_batches_and_cache_on_loaded_weights(make_llm):
    llm = make_llm()
    want = text_of(llm.generate("The river", GREEDY)[0])
    llm.reset(block_size=4, max_num_seqs=3, scheduling_policy="static")
    assert text_of(llm.generate("The river", GREEDY)[0]) == want
    assert llm.engine.stats.num_blocks == 128 * 4 and llm.engine.scheduler.max_num_seqs == 3
    with pytest.raises(ConfigError, match="'model' cannot be changed by a reset"):
        llm.reset(model="demo")
    with pytest.raises(ConfigError, match="max_num_batched_tokens=256 is less than max_num_seqs=300"):
        llm.reset(max_num_seqs=300)
    assert text_of(llm.generate("The river", GREEDY)[0]) == want


def test_a_greedy_and_a_sampled_request_do_not_disturb_each_other(llm):
    sampled = SamplingParams(temperature=1.2, seed=3, max_tokens=12, ignore_eos=True)
    alone = [text_of(llm.generate("The river", p)[0]) for p in (GREEDY, sampled)]
    assert [text_of(o) for o in llm.generate(["The river"] * 2, [GREEDY, sampled])] == alone
    assert alone[0] != alone[1]


def test_one_seed_draws_anew_at_every_position(make_llm):
    """Logits that are all equal: only the position can make the draws differ, and it is the token's own."""
    llm = make_llm()
    sample, positions = llm.runner.backend.sample, []

    def flat(out, logits, temperature, top_k, top_p, seed, position):
        logits[:] = 0
        positions.extend(position.tolist())
        sample(out, logits, temperature, top_k, top_p, seed, position)

    llm.runner.backend.sample = flat
    tokens = llm.generate([[1, 2, 3]], SamplingParams(seed=1, max_tokens=30, ignore_eos=True))[0].outputs[0].token_ids
    assert positions == list(range(3, 33)) and len(set(tokens)) > 20


def test_what_was_held_back_comes_out_when_a_request_ends(llm):
    """The end of the text may look like the beginning of a stop string."""
    text = text_of(llm.generate("The river", GREEDY)[0])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=text[-3:] + " and more")
    outputs = list(llm.stream("The river", params))
    assert text_of(outputs[-1]) == text == "".join(o.outputs[0].new_text for o in outputs)


def test_a_stop_string_that_is_complete_at_the_last_token_counts_as_stop(llm):
    text = text_of(llm.generate("The river", GREEDY)[0])
    output = llm.generate("The river", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=text[-2:]))[0]
    at = text.index(text[-2:])
    assert output.outputs[0].finish_reason == "stop" and text_of(output) == text[:at]


def test_a_stop_token_is_among_the_ids_and_not_in_the_text(llm):
    ids = llm.generate("The river", GREEDY)[0].outputs[0].token_ids
    stop = next(i for i in ids[3:] if i not in ids[:3])
    output = llm.generate("The river", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True,
                                                      stop_token_ids=[stop]))[0].outputs[0]
    assert output.token_ids == ids[:ids.index(stop) + 1] and output.stop_reason == stop
    assert output.text == llm.tokenizer.decode(output.token_ids[:-1])


def test_an_aborted_stream_adds_no_text(llm):
    stream = llm.stream("The river", GREEDY)
    text = "".join(next(stream).outputs[0].new_text for _ in range(4))
    llm.engine.abort(stream.request_id)
    last = next(stream)
    assert last.outputs[0].finish_reason == "abort" and len(last.outputs[0].token_ids) == 4
    assert text + last.outputs[0].new_text == text_of(last)
    with pytest.raises(StopIteration):
        next(stream)


def test_an_engine_error_in_generate_leaves_nothing_queued(llm):
    execute = llm.runner.execute
    llm.runner.execute = lambda batch: 1 / 0
    try:
        with pytest.raises(ZeroDivisionError):
            llm.generate(["The river", "The fox"], GREEDY)
        stream = llm.stream("The river", GREEDY)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    finally:
        llm.runner.execute = execute
    assert llm.engine.stats.num_waiting == llm.engine.stats.num_running == 0
    assert not llm._inbox and not llm._awaited and not llm.engine.has_unfinished_requests()


def test_a_stream_whose_request_was_taken_away_says_so(llm):
    stream = llm.stream("The river", GREEDY)
    next(stream)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    with pytest.raises(TinyVLLMError, match="ended without anybody taking its outputs"):
        for _ in stream:
            pass


def test_all_seats_at_full_length_when_it_is_no_multiple_of_a_block(make_llm):
    llm = make_llm(max_model_len=37, max_num_seqs=3, num_blocks=None)
    outputs = llm.generate([[i + 1] * 30 for i in range(3)], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [7, 7, 7]
    assert llm.engine.stats.num_preemptions == 0
