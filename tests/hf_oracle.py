"""transformers as the oracle: logits at every position and a greedy continuation, in bfloat16 and in float32."""

import numpy as np

from tests.parity_cases import KEPT_ROWS, NUM_NEW_TOKENS


def run_oracle(folder, prompt: list[int], num_new_tokens: int = NUM_NEW_TOKENS,
               device: str = "cpu") -> dict[str, np.ndarray]:
    """Greedy continuation of `prompt` in bfloat16, with the logits that chose it and the same rows in float32.

    Returns "tokens" [num_new_tokens], and "logits" and "truth" [rows, V] float32: the last KEPT_ROWS rows of the
    prompt (the very last one chooses the first new token), then the row after each new token but the last.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval().to(device)
    with torch.inference_mode():
        tokens, rows = [], []
        out = model(torch.tensor([prompt], device=device), use_cache=True)
        rows.append(out.logits[0, -KEPT_ROWS:])
        for _ in range(num_new_tokens):
            tokens.append(int(rows[-1][-1].argmax()))
            if len(tokens) == num_new_tokens:
                break
            out = model(torch.tensor([tokens[-1:]], device=device), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
        logits = torch.cat(rows)
        truth = model.float()(torch.tensor([prompt + tokens[:-1]], device=device)).logits[0, -len(logits):]
    return {"tokens": np.array(tokens, np.int32), "logits": logits.float().cpu().numpy(), "truth": truth.cpu().numpy()}
