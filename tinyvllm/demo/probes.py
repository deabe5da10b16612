"""What the attention heads do, and how surprised the model is by fresh text.

Induction score (Olsson et al. 2022, "In-context learning and induction heads"): on a sequence of random
tokens said twice, the attention from a token of the second showing to the token that came after it in the
first. Previous-token score: the attention from a token to the one before it. Both are means over positions,
per head, between 0 and 1.
"""

import math
import random

import torch

from tinyvllm.demo.corpus import NO_LOSS, document_tokens
from tinyvllm.demo.fables.documents import MIX, document
from tinyvllm.demo.fables.requests import request
from tinyvllm.demo.fables.story import tell
from tinyvllm.demo.tokenizer_recipe import BOS, EOS, SPECIAL_TOKENS, chat_text


def _attentions(model, ids: torch.Tensor) -> torch.Tensor:
    """Attention weights of all layers for ids [B, T]: float32 [layers, B, heads, T, T]."""
    return torch.stack([a.float() for a in model(ids, output_attentions=True).attentions])


def _best(scores: torch.Tensor) -> dict:
    """The best heads of scores [layers, heads]: {"best": score, "heads": {"layer.head": score of the top
    five}}.
    """
    flat = sorted(
        (
            (scores[layer, head].item(), f"{layer}.{head}")
            for layer in range(len(scores))
            for head in range(len(scores[0]))
        ),
        reverse=True,
    )
    return {
        "best": round(flat[0][0], 3),
        "above_half": sum(score >= 0.5 for score, _ in flat),
        "heads": {name: round(score, 3) for score, name in flat[:5]},
    }


@torch.no_grad()
def random_token_scores(model, vocab: int, sequences: int = 16, length: int = 100, seed: int = 3) -> dict:
    """Induction and previous-token scores on BOS + `length` random tokens said twice, and how often the
    second showing is predicted right.
    """
    numbers = torch.Generator().manual_seed(seed)
    plain = vocab - len(SPECIAL_TOKENS)
    tokens = torch.randint(0, plain, (sequences, length), generator=numbers)
    ids = torch.cat((torch.full((sequences, 1), plain), tokens, tokens), dim=1).to(model.device)
    logits = model(ids).logits
    attention = _attentions(model, ids)
    second = torch.arange(1 + length, 1 + 2 * length, device=ids.device)
    induction = attention[:, :, :, second, second - length + 1].mean((1, 3))
    later = torch.arange(2, 1 + 2 * length, device=ids.device)
    previous = attention[:, :, :, later, later - 1].mean((1, 3))
    right = (logits[:, length + 1 : -1].argmax(-1) == ids[:, length + 2 :]).float().mean().item()
    return {"induction": _best(induction), "previous_token": _best(previous), "copied_right": round(right, 4)}


@torch.no_grad()
def story_scores(model, tokenizer, stories: int = 12, seed: int = 55) -> dict:
    """The same two scores on real text: a story said twice, and chats whose request holds open words.

    "open_word_induction" looks only at the inner tokens of open words in the answer: the attention that goes
    to any earlier place where the token at hand was followed by something (the induction targets), summed.
    """
    rng = random.Random(seed)
    induction, previous, words = [], [], []
    for _ in range(stories):
        text = " " + " ".join(tell(rng).beats[:4])
        once = tokenizer.encode(text, add_special_tokens=False)
        ids = torch.tensor([[tokenizer.convert_tokens_to_ids(BOS), *once, *once]], device=model.device)
        attention = _attentions(model, ids)[:, 0]
        n = len(once)
        second = torch.arange(1 + n, 2 * n, device=ids.device)
        induction.append(attention[:, :, second, second - n + 1].mean(-1))
        later = torch.arange(2, 1 + n, device=ids.device)
        previous.append(attention[:, :, later, later - 1].mean(-1))
        while True:
            asked = request(rng, open_share=1.0)
            if asked.hero and asked.hero.noun and asked.thing:
                break
        answer = tell(rng, hero=asked.hero, thing=asked.thing, **asked.tell).text
        turns = [{"role": "user", "content": asked.text}, {"role": "assistant", "content": answer}]
        chat = tokenizer.encode(chat_text(turns), add_special_tokens=False)
        named = [
            tokenizer.encode(" " + w, add_special_tokens=False) for w in (asked.hero.noun, asked.thing.noun)
        ]
        at = [
            i + k
            for word in named if len(word) > 2
            for i in range(len(chat) // 4, len(chat) - len(word)) if chat[i : i + len(word)] == word
            for k in range(len(word) - 1)
        ]  # fmt: skip
        if at:
            ids = torch.tensor([chat], device=model.device)
            attention = _attentions(model, ids)[:, 0]
            row = []
            for i in at:
                targets = [j + 1 for j in range(i) if chat[j] == chat[i]]
                row.append(
                    attention[:, :, i, targets].sum(-1)
                    if targets
                    else torch.zeros_like(attention[:, :, 0, 0])
                )
            words.append(torch.stack(row).mean(0))
    result = {"story_twice_induction": _best(torch.stack(induction).mean(0)),
              "previous_token": _best(torch.stack(previous).mean(0))}  # fmt: skip
    if words:
        result["open_word_induction"] = _best(torch.stack(words).mean(0))
    return result


@torch.no_grad()
def perplexity(model, tokenizer, documents_per_kind: int = 40, seed: int = 77) -> dict[str, float]:
    """Perplexity per kind of document over the tokens that training counts, on documents of a seed never
    trained on.
    """
    rng = random.Random(f"held-out {seed}")
    result = {}
    for kind in MIX:
        total, count = 0.0, 0
        for _ in range(documents_per_kind):
            made = document(rng, kind)
            text = chat_text(made.messages) if made.messages else BOS + made.text + EOS
            ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
            if len(ids) > 2048:
                continue
            marks = torch.from_numpy(
                document_tokens(tokenizer.backend_tokenizer, made, ids.numpy()).astype("int32")
            )
            logits = model(ids[None].to(model.device)).logits[0, :-1].float().cpu()
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            counted = (marks[1:] & NO_LOSS) == 0
            total, count = total + loss[counted].sum().item(), count + int(counted.sum())
        result[kind] = round(math.exp(total / count), 4)
    return result
