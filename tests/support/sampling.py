"""The parts that families of tests marked `sampled(n)` are cut into: a run has one of them, by its seed."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from itertools import combinations
from typing import Any


def parts(family: Iterable[Mapping[str, Any]], count: int) -> list[int]:
    """The part, 0 to `count` - 1, of each test of a family, from the tests' parameters.

    A test goes to the part that has seen its values, and pairs of them, least. So the parts are of about one size, and
    each has every value that many tests share, as a dtype, a width or a backend of a table.
    """
    seen: list[Counter[Hashable]] = [Counter() for _ in range(count)]
    chosen = []
    for parameters in family:
        values = [(name, _hashable(value)) for name, value in parameters.items()]
        features = [(), *values, *combinations(values, 2)]
        part = min(range(count), key=lambda i: sum(seen[i][f] for f in features))
        seen[part].update(features)
        chosen.append(part)
    return chosen


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value  # type: ignore[no-any-return]
