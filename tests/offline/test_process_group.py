"""One failure becomes the failure of all, with one wording."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import pytest

from incr_ds.errors import ConfigError
from incr_ds.offline.process_group import agree, on_first


@dataclass
class ThreadGroup:
    """Two processes of a group, played by two threads."""

    rank: int
    values: list = field(default_factory=lambda: [None, None])
    barrier: Barrier = field(default_factory=lambda: Barrier(2))
    size: int = 2

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait(10)
        found = list(self.values)
        self.barrier.wait(10)
        return found

    def warn(self):
        pass


def outcomes(policy, works):
    """The result or the error of ``policy`` in each of two processes."""
    first = ThreadGroup(0)
    groups = first, ThreadGroup(1, first.values, first.barrier)

    def run(group, work):
        try:
            return policy(group, work)
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, groups, works))


def fails(error: Exception):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ConfigError("a.yaml: wrong."), ConfigError, "rank 1 of 2: a.yaml: wrong."),
        (OSError(28, "No space left on device", "f.pt"), OSError, "No space left on device (rank 1 of 2): 'f.pt'"),
        (KeyError("x"), RuntimeError, "rank 1 of 2: KeyError: 'x'"),
    ],
)
def test_a_failure_of_one_rank_is_raised_by_all_and_names_the_rank(error, kind, text):
    found = outcomes(agree, [lambda: 7, fails(error)])
    assert [type(item) for item in found] == [kind, kind]
    assert all(str(item).endswith(text) for item in found), found


def test_ranks_that_fail_alike_are_not_named():
    found = outcomes(agree, [fails(ConfigError("a.yaml: wrong.")), fails(ConfigError("a.yaml: wrong."))])
    assert [str(item) for item in found] == ["a.yaml: wrong."] * 2


def test_all_get_the_first_ranks_result_or_its_error():
    assert outcomes(on_first, [lambda: 7, fails(ConfigError("not called"))]) == [7, 7]
    found = outcomes(on_first, [fails(ConfigError("a.yaml: wrong.")), lambda: 7])
    assert [(type(item), str(item)) for item in found] == [(ConfigError, "a.yaml: wrong.")] * 2
