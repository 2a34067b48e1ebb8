"""Tokenize text as frequent words, and bytes for everything else."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping

# Bytes above 127 count as letters, so words are not split in UTF-8 or in Latin-1.
_WORD = re.compile(rb"[a-z0-9'\x80-\xff]+")
_WORD_OR_OTHER = re.compile(rb"([a-z0-9'\x80-\xff]+)|\S")
_SPACE = 0x20


def build_vocabulary(texts: Iterable[bytes], words: int) -> Mapping[bytes, int]:
    """Return the tokens of the most frequent words: 256 and up, by falling frequency, then alphabet.

    >>> build_vocabulary([b"The cat, the dog"], words=2)
    {b'the': 256, b'cat': 257}
    """
    counts: collections.Counter[bytes] = collections.Counter()
    for text in texts:
        counts.update(_WORD.findall(text.lower()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: 256 + rank for rank, word in enumerate(ranked[:words])}


def encode(text: bytes, vocabulary: Mapping[bytes, int], length: int) -> list[int]:
    """Return at most ``length`` tokens: words of the vocabulary, and the bytes of everything else.

    >>> encode(b"The cat", {b"the": 256}, length=9)
    [256, 99, 97, 116]
    """
    tokens: list[int] = []
    spelt = False  # whether the last token ends a word spelt in bytes
    for match in _WORD_OR_OTHER.finditer(text.lower()):
        if len(tokens) >= length:
            break
        word, is_word = match[0], match[1] is not None
        if word in vocabulary:
            tokens.append(vocabulary[word])
        else:
            tokens += [_SPACE, *word] if spelt and is_word else word
        spelt = is_word and word not in vocabulary
    return tokens[:length]
