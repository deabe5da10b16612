"""Model shapes that parity with transformers is shown on, and the measure of "equal" in bfloat16.

transformers in bfloat16 is itself only near the exact answer, so the yardstick is measured, not chosen: the same
weights run by transformers in float32 are the truth, and its own bfloat16 run shows how far correct bfloat16
arithmetic lands from it. Our logits must lie as near to the truth as those do, at every position.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.model_files import LLAMA3_ROPE, OMIT

NUM_NEW_TOKENS = 72


@dataclass(frozen=True)
class ParityCase:
    """A shape (overrides of the tiny config), how its files are written, and its prompt's length."""

    name: str
    overrides: dict = field(default_factory=dict)
    dtype: str = "bfloat16"
    shards: int = 1
    prompt_length: int = 40
    seed: int = 0

    def prompt(self) -> list[int]:
        """Random text token ids (no special tokens: they are the last ids)."""
        rng = np.random.default_rng(1000 + self.seed)
        return rng.integers(0, 370, self.prompt_length).tolist()


CASES = [
    ParityCase("tied_gqa"),
    ParityCase("untied_mqa", dict(tie_word_embeddings=False, num_key_value_heads=1), seed=1),
    ParityCase("biases", dict(attention_bias=True, mlp_bias=True), seed=2),
    ParityCase("llama3_rope_head64", dict(head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE,
                                          max_position_embeddings=131072), seed=3),
    ParityCase("linear_rope_head80", dict(head_dim=80, rope_scaling={"rope_type": "linear", "factor": 4.0}), seed=4),
    ParityCase("mha_head96", dict(head_dim=96, num_attention_heads=2, num_key_value_heads=2), seed=5),
    ParityCase("rope_parameters_head128", dict(
        head_dim=128, num_attention_heads=8, num_key_value_heads=1, rope_theta=OMIT, rope_scaling=OMIT,
        rope_parameters={"rope_type": "default", "rope_theta": 25000.0}), seed=6),
    ParityCase("derived_head_dim_odd_sizes", dict(head_dim=OMIT, hidden_size=96, num_attention_heads=3,
                                                  num_key_value_heads=3, intermediate_size=200,
                                                  num_hidden_layers=4), seed=7),
    ParityCase("float16_files", dict(rms_norm_eps=1e-6), dtype="float16", seed=8),
    ParityCase("float32_sharded_files", dict(tie_word_embeddings=False), dtype="float32", shards=3, seed=9),
    ParityCase("llama3_rope_beyond_8192", dict(head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE,
                                               max_position_embeddings=131072), prompt_length=8300, seed=10),
]
KEPT_ROWS = 40  # of the prompt's logits, the last ones


def compare(ours: np.ndarray, oracle: dict, min_clear: float = 0.4) -> None:
    """Assert that our logits [rows, V] (kept prompt rows, then one row a new token) are as good as the oracle's.

    oracle: "truth" (float32 run) and "logits" (bfloat16 run), teacher-forced on the same tokens.
    min_clear: share of the oracle's greedy choices that must be clear, or the comparison would show too little.
    """
    truth, theirs = oracle["truth"].astype(np.float64), oracle["logits"].astype(np.float64)
    assert ours.shape == truth.shape and np.isfinite(ours).all()
    our_error, their_error = np.abs(ours - truth), np.abs(theirs - truth)
    # A wrong formula or rounding point moves the mean far more than 15%. The largest of some 40,000 errors is a
    # matter of chance, for theirs as for ours: it may differ by half.
    assert our_error.mean() <= 1.15 * their_error.mean(), (our_error.mean(), their_error.mean())
    assert our_error.max() <= 1.5 * their_error.max(), (our_error.max(), their_error.max())

    # Greedy choice: equal wherever the oracle's own choice is clear of that error.
    clear = choice_gaps(oracle) > tolerance(oracle)
    assert clear.mean() > min_clear, f"the case shows too little: only {clear.mean():.0%} of its choices are clear"
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1))[clear].all()


def choice_gaps(oracle: dict) -> np.ndarray:
    """By how much the oracle prefers its first choice over its second, for each row."""
    top2 = np.sort(oracle["logits"].astype(np.float64), axis=1)[:, -2:]
    return top2[:, 1] - top2[:, 0]


def tolerance(oracle: dict) -> float:
    """A top-2 gap that bfloat16 error does not close.

    Each of two runs adds an error to each of two logits: four errors of the oracle's measured root mean square s
    have 2 s together, and four times that is out of reach of chance in a few hundred rows.
    """
    error = oracle["truth"].astype(np.float64) - oracle["logits"]
    return 8 * float(np.sqrt(np.mean(error**2)))
