"""What a default run leaves to the slow one."""

from itertools import combinations, product

import pytest
from case_selection import covering, pytest_collection_modifyitems

pytest_plugins = ["pytester"]

LARGE_TEST = """
import pytest

@pytest.mark.default_run("values")
@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("opt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("hidden", [96, 144, 192])
def test_large(family: str, hidden: int):
    ...
"""


def parts(cases, together):
    return {part for case in cases for part in combinations(sorted(case.items()), together)}


@pytest.mark.parametrize(("together", "count"), [(1, 5), (2, 15)])
def test_every_value_or_pair_is_met(together: int, count: int):
    cases = [{"family": f, "hidden": h, "tied": t} for f, h, t in product(range(5), range(3), range(2))]
    chosen = [cases[place] for place in covering(cases, together)]
    assert parts(chosen, together) == parts(cases, together)
    assert len(chosen) == count, "as few as the largest parameters allow"


def test_only_what_some_case_has_is_asked_for():
    assert covering([{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 1}], 2) == {0, 1}


def test_the_other_cases_are_slow(pytester):
    items = pytester.getitems(LARGE_TEST)
    pytest_collection_modifyitems(items)
    default = [item.name for item in items if not item.get_closest_marker("slow")]
    assert default == ["test_large[96-llama]", "test_large[144-gpt2]", "test_large[192-llama]"] and len(items) == 9
