"""Where a response begins among tokens, and which of its tokens are trained.

Tokens come with offsets, i64[n, 2]: the first character of each, and one past its last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Span = tuple[int, int]
"""First character of a text, and one past its last."""


def common_prefix(
    encodings: Sequence[tuple[np.ndarray, np.ndarray]], boundary: int
) -> int:
    """The longest prompt: leading tokens that all share and that end by `boundary`.

    Args:
      encodings: K of (ids, i32[n_k], and offsets).
      boundary: the character where the responses begin.

    Returns:
      The number of tokens.

    >>> offsets = np.array([[0, 2], [2, 3], [3, 5]])
    >>> one, other = np.array([7, 8, 9]), np.array([7, 6, 9])
    >>> common_prefix([(one, offsets)], 3), common_prefix([(one, offsets)], 2)
    (2, 1)
    >>> common_prefix([(one, offsets), (other, offsets)], 3)
    1
    """
    first = encodings[0][0]
    cut = len(first)
    for ids, offsets in encodings:
        beyond = np.flatnonzero(offsets[:cut, 1] > boundary)
        cut = min([cut, len(ids), *beyond[:1].tolist()])
        differing = np.flatnonzero(ids[:cut] != first[:cut])
        cut = min([cut, *differing[:1].tolist()])
    return cut


def dropped_characters(text: str, offsets: np.ndarray, *, begin: int) -> str:
    """The characters from `begin` on, blanks left out, that no token covers.

    >>> dropped_characters("ab cd", np.array([[0, 1], [4, 5]]), begin=1)
    'bc'
    """
    size = len(text) + 1
    opened, closed = (np.bincount(side, minlength=size) for side in offsets.T)
    bare = np.flatnonzero(np.cumsum(opened - closed)[begin:-1] == 0) + begin
    return "".join(text[index] for index in bare if not text[index].isspace())


def trained_tokens(
    offsets: np.ndarray, spans: Sequence[Span], boundary: int
) -> tuple[np.ndarray, list[int], list[tuple[int, int, int]]]:
    """Which tokens after the cut overlap a span of the assistant's text.

    Args:
      offsets: of the tokens after the cut.
      spans: of the assistant's texts; no text follows the last.
      boundary: the character where the response begins, at or before the first span.

    Returns:
      mask, bool[n]; the index of the last token of each span; and (start, stop, begin)
      of each token that starts before the begin of the span that it belongs to.

    >>> offsets = np.array([[2, 4], [4, 6], [6, 9]])
    >>> mask, ends, straddling = trained_tokens(offsets, [(3, 4), (7, 9)], 3)
    >>> mask.tolist(), ends, straddling
    ([True, False, True], [0, 2], [(2, 4, 3), (6, 9, 7)])
    """
    starts, stops = offsets.T
    mask, ends, straddling = np.zeros(len(offsets), bool), [], []
    for index, (begin, end) in enumerate(spans):
        inside = stops > begin
        if index == 0:
            # Tokens that begin before the boundary open the response, whatever text
            # they cover.
            inside |= (starts < boundary) | (begin == boundary)
        if index < len(spans) - 1:
            inside &= starts < end
        mask |= inside
        ends += np.flatnonzero(inside)[-1:].tolist()
        for token in np.flatnonzero(inside & (starts < begin)):
            straddling.append((int(starts[token]), int(stops[token]), begin))
    return mask, ends, straddling
