"""Names of classes and tokens, for pages and JSON."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jaxtrain.artifact.examples import Example
from jaxtrain.explain.forward import Forward


def class_name(forward: Forward, number: Any) -> str:
    """Return the name of a class or token, or its number where it has none."""
    labels = forward.manifest.labels
    if forward.task == "language_model" and forward.manifest.text is not None:
        return repr(_token_bytes(forward, int(number)).decode("latin-1"))
    if labels is not None and 0 <= int(number) < len(labels):
        return labels[int(number)]
    return str(int(number))


def token_texts(forward: Forward, example: Example, values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the pieces of a text and a number for each: those of the bytes of a character are added.

    Args:
      forward: the model, which knows the vocabulary.
      example: with the tokens.
      values: float ``[tokens]``.
    """
    tokens = np.asarray(example.inputs[forward.field])[: len(values)]
    if forward.manifest.text is None:
        return values, [f"{int(token)} " for token in tokens]
    texts = [_token_bytes(forward, int(token)) for token in tokens]
    words, was_word = forward.words is not None, False
    numbers: list[float] = []
    pieces: list[str] = []
    for start, end in _characters(texts):
        text = b"".join(texts[start:end]).decode("utf-8", errors="replace")
        is_word = int(tokens[start]) >= 256
        if words and pieces and (is_word or was_word):  # the tokenizer has dropped these spaces
            pieces[-1] += " "
        pieces.append(_visible(text))
        numbers.append(float(values[start:end].sum()))
        was_word = is_word
    return np.array(numbers), pieces


def _characters(texts: list[bytes]) -> list[tuple[int, int]]:
    """Return where the characters of a text in UTF-8 begin and end, in tokens.

    >>> _characters([b"a", b"\\xc3", b"\\xa9", b"cat"])
    [(0, 1), (1, 3), (3, 4)]
    """
    spans: list[tuple[int, int]] = []
    for number, text in enumerate(texts):
        continues = len(text) == 1 and 0x80 <= text[0] < 0xC0
        if continues and spans and len(texts[spans[-1][0]]) == 1 and texts[spans[-1][0]][0] >= 0xC0:
            spans[-1] = spans[-1][0], number + 1
        else:
            spans.append((number, number + 1))
    return spans


def _visible(text: str) -> str:
    """Return a character with a sign for those that have no width."""
    return {"\n": "⏎\n", "\t": "→\t", "\0": "␀"}.get(text, text)


def _token_bytes(forward: Forward, token: int) -> bytes:
    if token < 256:
        return bytes([token])
    words = _words(forward.words or b"")
    return words[token - 256] if token - 256 < len(words) else f"<{token}>".encode()


@functools.lru_cache(maxsize=2)
def _words(vocabulary: bytes) -> list[bytes]:
    return vocabulary.split(b"\n")[:-1]
