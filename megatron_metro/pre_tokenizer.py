"""METRO's pre-tokeniser: what happens to text before SentencePiece sees it (reference section 2). It has no inverse."""

import re
import unicodedata
from functools import lru_cache

_CHARACTERS = str.maketrans("‘’´“”—–", "'''\"\"--")  # noqa: RUF001 (typographic signs to those of a typewriter)
_DOUBLED_QUOTES = re.compile("``|''")
_ASCII_PUNCTUATION = ((33, 47), (58, 64), (91, 96), (123, 126))  # signs such as $ and ^ are no punctuation in Unicode
_LOOSE_ENDING = re.compile(r"' ([smdtSMDT]|ll|re|ve)\b")
_LOOSE_CAPITAL_ENDING = re.compile(r"' (LL|RE|VE)\b")


def pre_tokenize(text: str, *, lowers: bool) -> str:
    """Words with the punctuation around them set apart, one blank between any two; in lower case with `lowers`.

    Punctuation inside a word stays, and so do words of nothing else. Endings such as 's keep their apostrophe.
    """
    plain = _DOUBLED_QUOTES.sub('"', text.strip()).translate(_CHARACTERS)
    line = " ".join(part for word in plain.split() for part in _peel(word))
    line = _LOOSE_ENDING.sub(r"'\1", line)
    line = _LOOSE_CAPITAL_ENDING.sub(r"'\1 ", line)
    line = " ".join(line.split())
    return line.lower() if lowers else line


def _peel(word: str) -> list[str]:
    """A word without the runs of punctuation at its ends, and these runs."""
    inside = [place for place, character in enumerate(word) if not _is_punctuation(character)]
    if not inside:
        return [word]
    first, last = inside[0], inside[-1] + 1
    return [part for part in (word[:first], word[first:last], word[last:]) if part]


@lru_cache(maxsize=1 << 16)
def _is_punctuation(character: str) -> bool:
    code = ord(character)
    return any(low <= code <= high for low, high in _ASCII_PUNCTUATION) or unicodedata.category(character)[0] == "P"
