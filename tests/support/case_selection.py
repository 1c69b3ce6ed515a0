"""A pytest plugin: a default run has enough cases of a large test to meet each value of its parameters.

``@pytest.mark.default_run("values")`` keeps cases that have every value of every parameter, and ``"pairs"`` those that
have every pair of values. All other cases are slow.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import pytest

TOGETHER = {"values": 1, "pairs": 2}
Case = dict[str, str]  # each parameter's value, as it is printed


@pytest.hookimpl(tryfirst=True)  # before pytest itself deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("default_run") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        (kind,) = cases[0].get_closest_marker("default_run").args
        values = [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases]
        chosen = covering(values, TOGETHER[kind])
        for place, case in enumerate(cases):
            if place not in chosen:
                case.add_marker("slow")


def covering(cases: Sequence[Case], together: int) -> set[int]:
    """Places of a few ``cases`` that have every value (``together`` 1) or every pair of values (2) that any of them has.

    Greedy: the next one is the first of those that add most.
    """
    parts = [set(combinations(sorted(case.items()), together)) for case in cases]
    missing, chosen = set().union(*parts), set()
    while missing:
        best = max(range(len(cases)), key=lambda place: len(parts[place] & missing))
        missing -= parts[best]
        chosen.add(best)
    return chosen
