"""The quick ways beside the plain ones: a step with the rows of the step before, and columns instead of rows."""

import copy
import pickle
import random

import numpy as np
import pytest

from tests.toy import AheadToyRunner, run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.request import Request
from tinyvllm.engine.scheduler import SchedulerOutput
from tinyvllm.runner.batch import BatchBuilder
from tinyvllm.runner.block_tables import BlockTables


class Words:
    """A tokenizer whose tokens are their numbers."""

    def incremental_detokenizer(self, stop, **_):
        return Spelling(stop)


class Spelling:
    def __init__(self, stop):
        self.stop, self.text, self.stop_reason = stop, "", None

    def push(self, token_ids):
        new = "".join(f"{i} " for i in token_ids)
        self.stop_reason = next((s for s in self.stop if s in self.text + new), None)
        self.text += new
        return new

    def finish(self):
        return ""


def storm(seed, quick):
    """(all that anybody is told, steps that the quick way made) of random traffic, the same for the same seed."""
    draw = random.Random(seed)
    engine = toy_engine(draw.randint(5, 40), draw.randint(1, 5), draw.randint(1, 8), draw.randint(4, 40),
                        enable_prefix_caching=draw.random() < 0.5, tokenizer=draw.choice([None, Words()]),
                        scheduling_policy=draw.choice(["continuous", "static"]), eos_token_ids=draw.choice([(), (7,)]),
                        runner_type=AheadToyRunner)
    scheduler, log, told, num_quick = engine.scheduler, EventLog(), [], [0]
    engine.listen(log)
    engine.runner.limits = 1000, 8
    same_rows_again = scheduler._same_rows_again

    def counted():
        output = same_rows_again() if quick else None
        num_quick[0] += output is not None
        return output

    scheduler._same_rows_again = counted

    def step():
        try:
            for output in engine.step(ahead=draw.random() < 0.8):
                done = output.outputs[0]
                told.append((output.request_id, done.token_ids, done.text, done.new_text, done.finish_reason,
                             done.stop_reason, output.num_cached_tokens, output.metrics.num_preemptions))
        except RuntimeError as error:
            told.append(str(error))
        engine.kv_cache_manager.check()

    for i in range(50):
        what = draw.random()
        if what < 0.25:
            stop = str(draw.randint(10, 49)) if engine.tokenizer and draw.random() < 0.3 else None
            engine.add_request([draw.randint(0, 1) for _ in range(draw.randint(1, 4))], SamplingParams(
                temperature=0, max_tokens=draw.randint(1, 30), ignore_eos=draw.random() < 0.6, stop=stop), str(i))
        elif what < 0.3 and scheduler.running:
            engine.abort(draw.choice(scheduler.running).request_id)
        elif what < 0.35:
            engine.runner.fail_next = True
            step()
            engine.runner.fail_next = False
        elif what < 0.4:
            scheduler.max_num_seqs, scheduler.max_num_batched_tokens = draw.randint(1, 8), draw.choice([2, 3, 40])
        elif what < 0.45:
            engine.settle()
        else:
            for _ in range(draw.randint(1, 8)):
                step()
    for _ in range(2000):
        if not engine.has_unfinished_requests():
            break
        step()
    events = [(e.kind, e.step, e.request_id, None if e.kind == "step_ended" else e.a, e.b) for e in log.read()[0]]
    return (told, events, engine.runner.batches, engine.stats), num_quick[0]


def test_a_step_with_the_rows_of_the_step_before_is_what_handing_out_tokens_would_come_to():
    total = 0
    for seed in range(120):
        (told, num_quick), (plainly, _) = storm(seed, True), storm(seed, False)
        assert told == plainly, seed
        total += num_quick
    assert total > 1000


def test_the_quick_way_is_the_usual_one():
    engine = toy_engine(num_blocks=64, runner_type=AheadToyRunner)
    for i in range(4):
        engine.add_request([i], SamplingParams(temperature=0, max_tokens=40))
    handed_out, hand_out = [], engine.scheduler._hand_out
    engine.scheduler._hand_out = lambda: handed_out.append(1) or hand_out()
    run(engine)
    assert engine.num_steps == 40 and len(handed_out) == 2, "the first step, and the empty one behind the last"


# ---- columns ----

def random_step(draw, block_size, most=6):
    rows = []
    for is_long in sorted(draw.random() < 0.5 for _ in range(draw.randint(1, most))):
        start = draw.randint(0, 20)
        count = draw.randint(2, 9) if is_long else 1
        request = Request(str(len(rows)), [draw.randint(0, 999) for _ in range(start + count + draw.randint(0, 1))],
                          SamplingParams(), max_len=100)
        blocks = draw.sample(range(500), -(-(start + count) // block_size) + draw.randint(0, 2))
        rows.append((request, start, count, start + count == request.num_tokens, blocks))
    requests, starts, counts, samples, block_ids = map(list, zip(*rows))
    return SchedulerOutput(requests, np.array(starts, np.int32), np.array(counts, np.int32), np.array(samples),
                           block_ids, counts.count(1), sum(samples), sum(counts))


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_batch_says_of_every_token_what_its_row_says(block_size):
    draw = random.Random(block_size)
    builder = BatchBuilder(100, 6, 40, block_size, np.empty, lambda device, host: host)
    for _ in range(50):
        output = random_step(draw, block_size)
        batch = builder.build(output)
        tokens = [(s.request.token_ids[p], p, s.block_ids[p // block_size] * block_size + p % block_size)
                  for s in output.scheduled for p in range(s.start, s.start + s.num_scheduled_tokens)]
        assert list(zip(batch.input_ids, batch.positions, batch.slot_mapping)) == tokens
        ends = np.cumsum([s.num_scheduled_tokens for s in output.scheduled])
        assert batch.query_start_loc.tolist() == [0, *ends]
        assert batch.seq_lens.tolist() == [s.start + s.num_scheduled_tokens for s in output.scheduled]
        assert batch.logits_indices.tolist() == [end - 1 for s, end in zip(output.scheduled, ends) if s.sample]
        width = max(len(s.block_ids) for s in output.scheduled)
        assert batch.block_tables.tolist() == [s.block_ids + [0] * (width - len(s.block_ids)) for s in output.scheduled]


def test_block_tables_follow_their_requests_from_row_to_row():
    draw, block_size = random.Random(0), 3
    tables, alive = BlockTables(8, 12, block_size), []  # of alive: [blocks, position]
    for _ in range(400):
        what = draw.random()
        if what < 0.2 and len(alive) < 8:
            alive.insert(draw.randint(0, len(alive)), [draw.sample(range(500), draw.randint(1, 3)), 0])
        elif what < 0.35 and alive:
            alive.remove(draw.choice(alive))
        elif what < 0.45:
            draw.shuffle(alive)
        elif what < 0.5 and alive:  # preempted: other blocks, in a list of their own
            draw.choice(alive)[0] = draw.sample(range(500), 12)
        step = [blocks for blocks, _ in alive]
        for _ in range(draw.randint(1, 5) if alive else 0):
            for row in alive:
                row[1] = min(row[1] + draw.randint(0, 2), 12 * block_size - 1)
                while len(row[0]) <= row[1] // block_size:
                    row[0].append(draw.randint(0, 499))
            if draw.random() < 0.8:  # else the step is computed in another way
                slots = tables.slots(step, np.array([position for _, position in alive], np.int32))
                assert slots.tolist() == [blocks[p // block_size] * block_size + p % block_size for blocks, p in alive]
                for i, (blocks, p) in enumerate(alive):
                    known = p // block_size + 1
                    assert tables.array[i, :known].tolist() == blocks[:known]


# ---- outputs ----

def test_an_output_that_is_looked_at_late_says_what_it_would_have_said_at_once():
    told = []
    for look in (lambda output: None, repr):
        engine, outputs = toy_engine(num_blocks=7, block_size=4, max_num_batched_tokens=64), []
        for name in "abc":
            engine.add_request([1, 2, 3, 4, ord(name) % 7], SamplingParams(temperature=0, max_tokens=9), name)
        while engine.has_unfinished_requests():
            for output in engine.step():
                look(output)
                outputs.append(output)
        assert engine.stats.num_preemptions
        told.append([(o.request_id, o.prompt_token_ids, o.outputs[0].token_ids, o.finished, o.outputs[0].finish_reason,
                      o.metrics.num_output_tokens, o.metrics.num_preemptions, o.metrics.finished_time is None,
                      o.metrics.tpot is None) for o in outputs])
    assert told[0] == told[1] and {row[6] for row in told[0]} == {0, 1}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_outputs_can_be_copied_and_sent(duplicate):
    engine = toy_engine()
    engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3), "a")
    (first,) = engine.step()
    again = duplicate(first)
    run(engine)
    assert again == first and repr(again) == repr(first) and len(again.outputs[0].token_ids) == 1
    with pytest.raises(AttributeError, match="has no 'text'"):
        _ = first.text


def test_what_is_set_in_an_output_stays():
    engine = toy_engine()
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True), "a")
    output = engine.step()[0]
    output.prompt = "mine"
    assert output.metrics.num_output_tokens == 1 and output.prompt == "mine"
    output.outputs = []
    assert (output.prompt, output.outputs, output.prompt_token_ids) == ("mine", [], [1, 2, 3])


def test_an_output_sent_elsewhere_takes_no_later_tokens_along():
    engine = toy_engine()
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True), "a")
    early = engine.step()[0]
    size = len(pickle.dumps(copy.deepcopy(early)))
    request = engine._requests["a"]
    while engine.has_unfinished_requests():
        engine.step()
    assert len(pickle.dumps(early)) <= size + 16  # a number more or less of a time
    assert request.token_times == []
