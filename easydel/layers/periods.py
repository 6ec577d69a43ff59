"""Which layers are alike, so that they can be stored together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def ranges_of(kinds: Sequence[Hashable]) -> list[range]:
    """Cut layers into runs that repeat a pattern; return one range for each position in a run's pattern.

    Each run is the longest that begins where the last one ended, with the shortest pattern that makes it; layers that
    repeat nothing are runs of one. The ranges of a run have the same `stop` and `step`.

    Args:
        kinds: of each layer.

    Example:
        `ranges_of("ababa")` is `[range(0, 4, 2), range(1, 4, 2), range(4, 5)]`, `ranges_of("aabbb")`
        `[range(0, 2), range(2, 5)]`.
    """
    found: list[range] = []
    start = 0
    while start < len(kinds):
        length, period = _longest_run(kinds[start:])
        found += [range(start + offset, start + length, period) for offset in range(period)]
        start += length
    return found


def _longest_run(kinds: Sequence[Hashable]) -> tuple[int, int]:
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        repeats = 1
        while list(kinds[repeats * period : (repeats + 1) * period]) == list(kinds[:period]):
            repeats += 1
        if repeats > 1 and repeats * period > best[0]:
            best = (repeats * period, period)
    return best
