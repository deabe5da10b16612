"""Tiny tokenizers of the kinds that Llama-family models have, for the tests of tinyvllm.text."""

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.model_files import tiny_tokenizer

SPACE = "\u2581"


def byte_level():
    """Byte-level BPE with specials, as Llama 3, and tokens that were added as plain text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<a b>"), AddedToken("\u0120q"), AddedToken("\U0001f600\U0001f600")])
    return tokenizer


def _sentencepiece_model():
    """BPE with byte fallback over a few characters and merges, as Llama 2."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [SPACE, *"abcdefghijklmnopqrstuvwxyz.,!#", "\u00e9"]
    merges = [(SPACE, "a"), ("t", "h"), ("th", "e"), (SPACE, "the"), ("f", "o"), ("fo", "x"), (SPACE, "fox"),
              (SPACE, SPACE), ("#", "#")]  # fmt: skip
    tokens += [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _with_specials(tokenizer):
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece():
    """As Llama 2's tokenizer.json: a space is put in front, and its decoder takes one away."""
    tokenizer = Tokenizer(_sentencepiece_model())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(tokenizer)


def sentencepiece_unstripped():
    """The same without the space in front, as some newer exports."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def metaspace(prepend_scheme="always"):
    """With the Metaspace pre-tokenizer and decoder, as other exports of SentencePiece models."""
    tokenizer = Tokenizer(_sentencepiece_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prepend_scheme)
    metaspace_decoder = decoders.Metaspace(SPACE, prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace_decoder])
    return _with_specials(tokenizer)


TOKENIZERS = {
    "byte_level": functools.cache(byte_level),
    "sentencepiece": functools.cache(sentencepiece),
    "sentencepiece_unstripped": functools.cache(sentencepiece_unstripped),
    "metaspace": functools.cache(metaspace),
    "metaspace_never": functools.cache(functools.partial(metaspace, "never")),
}
