"""The parts that families of tests marked `sampled(n)` are cut into: a run has one of them, by its seed."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
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
        values = list(_values(parameters))
        features = [(), *values, *combinations(values, 2)]
        part = min(range(count), key=lambda i: sum(seen[i][f] for f in features))
        seen[part].update(features)
        chosen.append(part)
    return chosen


def _values(parameters: Mapping[str, Any]) -> Iterator[tuple[str, Hashable]]:
    """(name, value), of a parameter that is a dict each of its values; what has no hash counts by its identity."""
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _values({f"{name}.{key}": v for key, v in value.items()})
            continue
        try:
            hash(value)
        except TypeError:
            value = id(value)
        yield name, value
