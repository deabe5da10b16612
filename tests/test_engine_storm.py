"""Random storms of add, step, abort, failing steps on tiny pools: no leak, no deadlock, no starvation, exact text."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.test_events import assert_state_equals_engine, catch_up
from tests.toy import AheadToyRunner, ToyRunner, continuation, run, toy_engine
from tinyvllm import SamplingParams
from tinyvllm.engine.events import EventLog
from tinyvllm.engine.state import EngineState


class Storm(RuleBasedStateMachine):
    """The engine under arbitrary traffic; every output is compared with the toy model run alone."""

    @initialize(num_blocks=st.integers(3, 10), block_size=st.integers(1, 5), seats=st.integers(1, 4),
                budget=st.integers(4, 20), caching=st.booleans(), policy=st.sampled_from(["continuous", "static"]),
                use_kv_cache=st.booleans(), runner_type=st.sampled_from([ToyRunner, AheadToyRunner]))
    def start(self, num_blocks, block_size, seats, budget, caching, policy, use_kv_cache, runner_type):
        self.engine = toy_engine(num_blocks, block_size, seats, budget, scheduling_policy=policy,
                                 enable_prefix_caching=caching and use_kv_cache, use_kv_cache=use_kv_cache,
                                 runner_type=runner_type)
        self.log, self.state = EventLog(), EngineState()
        self.engine.listen(self.log)
        self.capacity = num_blocks * block_size
        self.expected, self.aborted, self.done = {}, set(), {}

    @rule(data=st.data(), max_tokens=st.integers(1, 12))
    def add(self, data, max_tokens):
        if self.capacity < 2:
            return
        # Few distinct tokens, so that prefixes do repeat.
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=self.capacity - 1))
        name = self.engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
        self.expected[name] = continuation(prompt, min(max_tokens, self.capacity - len(prompt)))

    @rule(times=st.integers(1, 6), ahead=st.booleans())
    def step(self, times, ahead):
        for _ in range(times):
            self._take(self.engine.step(ahead))

    @rule()
    def settle(self):
        self.engine.settle()

    @rule()
    def failing_step(self):
        self.engine.runner.fail_next = True
        try:
            self._take(self.engine.step(ahead=True))
        except RuntimeError:
            pass
        self.engine.runner.fail_next = False

    @rule(data=st.data())
    def abort(self, data):
        alive = sorted(set(self.expected) - set(self.done) - self.aborted)
        if alive:
            name = data.draw(st.sampled_from(alive))
            running_or_waiting = [*self.engine.scheduler.running, *self.engine.scheduler.waiting]
            if name in [request.request_id for request in running_or_waiting]:  # else its last output is on its way
                self.aborted.add(name)
            self.engine.abort(name)

    @rule()
    def tell_again(self):
        since, late = self.log.next_seq, EngineState()
        self.engine.listen(self.log)
        for event in self.log.read(since)[0]:
            late.apply(event)
        assert_state_equals_engine(late, self.engine)

    @invariant()
    def the_books_balance(self):
        if hasattr(self, "engine"):
            self.engine.kv_cache_manager.check()
            catch_up(self.state, self.log)
            if not self.engine.pipeline.steps:
                assert_state_equals_engine(self.state, self.engine)

    def _take(self, outputs):
        for output in outputs:
            got, want = output.outputs[0].token_ids, self.expected[output.request_id]
            assert got == want[:len(got)]
            if output.finished:
                self.done[output.request_id] = output
                aborted = output.outputs[0].finish_reason == "abort"
                assert aborted == (output.request_id in self.aborted)
                assert aborted or got == want

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self._take(run(self.engine, max_steps=20_000).values())  # raises if it never ends
        assert set(self.done) == set(self.expected)
        self.engine.kv_cache_manager.check()
        assert self.engine.stats.num_free_blocks == self.engine.stats.num_blocks


Storm.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None, derandomize=True,
                                   suppress_health_check=list(HealthCheck))
test_storm = Storm.TestCase
