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


def greedy_stories(folder, prompts: list[list[int]], attention: str = "sdpa", max_new_tokens: int = 600):
    """Greedy continuations in bfloat16 by transformers' own generate(), one prompt at a time: lists of token ids."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention).eval()
    with torch.inference_mode():
        return [model.generate(torch.tensor([prompt]), do_sample=False,
                               max_new_tokens=max_new_tokens)[0].tolist()[len(prompt):] for prompt in prompts]


def demo_chats(folder, prompts: list[list[int]]) -> list[dict[str, np.ndarray]]:
    """Greedy stories; for each token the choice given the ones before, its logit's size and lead over the second."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.parity_cases import choice_gaps

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    chats = []
    for prompt, tokens in zip(prompts, greedy_stories(folder, prompts)):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1:].float().numpy()
        # "choices" are this pass's; the token-by-token pass that wrote the story may have broken a tie otherwise.
        chats.append({"prompt": np.array(prompt, np.int32), "tokens": np.array(tokens, np.int32),
                      "choices": logits.argmax(axis=1).astype(np.int32),
                      "gaps": choice_gaps({"logits": logits}).astype(np.float32),
                      "best": np.abs(logits).max(axis=1).astype(np.float32)})
    return chats
