"""The demo model's tokenizer: byte-level BPE, Llama 3's special tokens and its way of cutting text into
words.

tokenizer = train_tokenizer(seed=7)
write_tokenizer(tokenizer, Path("model"))
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tinyvllm.demo.fables.documents import document
from tinyvllm.demo.fables.story import tell

VOCAB_SIZE = 2048
CONTEXT = 2048  # the longest text the model is trained on, in tokens
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
SPECIAL_TOKENS = [
    BOS,
    EOS,
    HEADER,
    END_HEADER,
    EOT,
    PAD,
    "<|eom_id|>",
    "<|python_tag|>",
]  # the last ids, in this order

# Words with the space or sign before them; numbers by three digits; signs with the line ends after them; line
# ends; spaces. The same classes as Llama 3's splitter.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# One header per message, two line ends, the text, <|eot_id|>. Unlike Llama 3.2's own template it adds no
# system message with dates: what the user writes is all that the model reads.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}"
)


def chat_text(messages: list[dict[str, str]]) -> str:
    """What CHAT_TEMPLATE makes of `messages`, without the generation prompt (the training text needs no
    jinja).
    """
    parts = [f"{HEADER}{m['role']}{END_HEADER}\n\n{m['content'].strip()}{EOT}" for m in messages]
    return BOS + "".join(parts)


def _sample_texts(seed: int, count: int):
    """Text to count letter pairs in: stories and chats from the lists, and a smaller part with open words."""
    rng = random.Random(seed)
    for i in range(count):
        yield tell(rng).text
        if i % 2 == 0:
            made = document(rng)
            yield "\n\n".join([m["role"] + "\n\n" + m["content"] for m in made.messages]) or made.text


def train_tokenizer(seed: int = 7, vocab_size: int = VOCAB_SIZE, documents: int = 20000) -> Tokenizer:
    """Learn the merges on freshly generated text; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_texts(seed, documents), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n", encoding="utf-8")
