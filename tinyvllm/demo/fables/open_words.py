"""Words that no list holds. A model copies what it is asked for only if it cannot learn the answers by heart,
so heroes, objects and names come from very many random strings as well: syllables, words that look like
English, blends of two words, bare letters, and now and then capitals, digits and accents.
"""

from functools import lru_cache

from tinyvllm.demo.fables import lexicon

_ONSETS = (
    "b c d f g h j k l m n p r s t v w z b d f g k l m n p r s t bl br ch cl cr dr fl fr gl gr kn ph pl pr "
    "qu sc sh sk sl sm sn sp st str sw th thr tr tw wh x y"
).split()
_NUCLEI = "a e i o u a e i o u ai au ea ee ei ie io oa oo ou ue y ia eo uo".split()
_CODAS = ("", "", "", "", "b", "ck", "d", "f", "g", "l", "ll", "lt", "m", "mp", "n", "nd", "ng", "nk", "nt",
    "p", "r", "rd",
          "rk", "rm", "rn", "rt", "s", "sh", "sk", "ss", "st", "t", "th", "ve", "x", "z")  # fmt: skip
_ENDINGS = ("er", "or", "ist", "ian", "ling", "let", "ette", "ine", "ium", "ing", "ment", "ness", "ful",
    "ard", "oid",
            "phone", "scope", "graph", "meter", "board", "man", "bot", "saur", "mobile", "cycle", "ator",
            "ology",
            "ant", "ent", "able", "ess", "ola", "ade", "age", "ique", "tron")  # fmt: skip
_ACCENTED = "áàâäãåéèêëíìîïóòôöõøúùûüñçßæœšžčřłğışßβλπжияюд"
_TITLES = (
    "Mr.",
    "Mrs.",
    "Miss",
    "Doctor",
    "Captain",
    "Master",
    "King",
    "Queen",
    "Sir",
    "Lady",
    "Aunt",
    "Old",
    "Big",
)


@lru_cache(maxsize=1)
def reserved() -> frozenset[str]:
    """Words that only the evaluation may use (demo/outside.py): no generated word may equal one."""
    from tinyvllm.demo.outside import OUTSIDE_WORDS

    return OUTSIDE_WORDS


@lru_cache(maxsize=1)
def _real_words() -> list[str]:
    words: set[str] = set()
    for phrase in [*lexicon.HEROES, *lexicon.OBJECTS, *sum(lexicon.ADJECTIVES.values(), [])]:
        words.update(part for part in phrase.lower().split() if part.isalpha() and len(part) > 2)
    words.update(name.lower() for name in lexicon.GENDER_OF_NAME)
    return sorted(words)


@lru_cache(maxsize=1)
def _followers() -> dict[str, str]:
    """Which letters follow each pair of letters in real words (an order-2 Markov chain; "^" starts, "$"
    ends).
    """
    table: dict[str, str] = {}
    for word in _real_words():
        marked = f"^^{word}$"
        for i in range(2, len(marked)):
            table[marked[i - 2 : i]] = table.get(marked[i - 2 : i], "") + marked[i]
    return table


def _syllables(rng) -> str:
    count = 1 + int(rng.random() * 3.2)
    return "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(count)) + rng.choice(_CODAS)


def _markov(rng) -> str:
    word, table = "^^", _followers()
    while len(word) < 14:
        letter = rng.choice(table[word[-2:]])
        if letter == "$":
            break
        word += letter
    return word[2:]


def _blend(rng) -> str:
    left, right = rng.choice(_real_words()), rng.choice(_real_words())
    return left[: 2 + int(rng.random() * 4)] + right[-(2 + int(rng.random() * 4)) :]


def _suffixed(rng) -> str:
    stem = rng.choice(_real_words())[:6] if rng.random() < 0.5 else _syllables(rng)
    return stem + rng.choice(_ENDINGS)


def _letters(rng) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(2 + int(rng.random() * 8)))


def _near_miss(rng) -> str:
    """A real word with a new end, or with one letter changed: what must not be completed to the real one."""
    word = rng.choice(_real_words())
    if rng.random() < 0.6:
        return word[: len(word) - int(rng.random() * 3)] + _syllables(rng)[:4]
    at = int(rng.random() * len(word))
    return word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :]


def open_word(rng) -> str:
    """One lower-case word of 2 or more letters that is neither a reserved word nor, as a rule, a real one."""
    while True:
        draw = rng.random()
        if draw < 0.28:
            word = _syllables(rng)
        elif draw < 0.53:
            word = _markov(rng)
        elif draw < 0.72:
            word = _blend(rng)
        elif draw < 0.87:
            word = _suffixed(rng)
        elif draw < 0.92:
            word = _letters(rng)
        elif draw < 0.97:
            word = _near_miss(rng)
        else:
            word = rng.choice(_real_words()) + rng.choice(_real_words())
        if rng.random() < 0.03:
            at = int(rng.random() * len(word))
            word = word[:at] + rng.choice(_ACCENTED) + word[at + 1 :]
        if len(word) > 1 and word not in reserved():
            return word


def open_noun(rng) -> str:
    """A noun phrase without an article: mostly one open word, sometimes two, hyphenated, or with an
    adjective.
    """
    draw = rng.random()
    if draw < 0.66:
        return open_word(rng)
    if draw < 0.76:
        return f"{open_word(rng)} {open_word(rng)}"
    if draw < 0.84:
        return f"{open_word(rng)} {rng.choice(_real_words())}"
    if draw < 0.93:
        return f"{rng.choice(_real_words())} {open_word(rng)}"
    if draw < 0.95:
        return f"{open_word(rng)}-{open_word(rng)}"
    if draw < 0.97:
        return open_word(rng).upper() if rng.random() < 0.5 else open_word(rng).capitalize()
    return f"{open_word(rng)} {int(rng.random() * 1000)}" if rng.random() < 0.5 else _letters(rng).upper()


def open_adjective(rng) -> str:
    """An adjective: half of the time one that no list holds."""
    return open_word(rng) if rng.random() < 0.5 else rng.choice(sum(lexicon.ADJECTIVES.values(), []))


def open_name(rng) -> str:
    """An invented proper name: "Zorbel", "Ann-Mirie", "Captain Flum", "R2D7", "Ömbrel"."""
    name = open_word(rng).capitalize()
    draw = rng.random()
    if draw < 0.06:
        return f"{rng.choice(_TITLES)} {name}"
    if draw < 0.11:
        return f"{name} {open_word(rng).capitalize()}"
    if draw < 0.14:
        return f"{name}-{open_word(rng).capitalize()}"
    if draw < 0.16:
        return f"{rng.choice(('O', 'D', 'Mc', 'Mac'))}{rng.choice((chr(39), ''))}{name}"
    if draw < 0.19:
        return "".join(
            rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") for _ in range(2 + int(rng.random() * 4))
        )
    return name
