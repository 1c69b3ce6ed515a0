"""A rank that is slow is named; one that hangs ends the job, with the stacks of all ranks."""

import time

import pytest
from fault_runs import Started, run_content, train_each, write_material, write_run

from incr_ds.testing.processes import run_processes
from incr_ds.train.watchdog import GRACE, HUNG

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("hung") / "material")


def train_slowly(content, where):
    """Train while rank 1 is slow in ``where``. Returns what this rank printed."""
    import os
    from contextlib import redirect_stdout
    from io import StringIO

    from incr_ds.data import samples
    from incr_ds.model.blocks import DecoderLayer

    owner, name = {"data": (samples, "_stack"), "forward": (DecoderLayer, "run")}[where]
    whole = getattr(owner, name)

    def slow(*arguments):
        time.sleep(0.1)
        return whole(*arguments)

    if os.environ["RANK"] == "1":
        setattr(owner, name, slow)
    with redirect_stdout(StringIO()) as shown:
        errors = train_each([content])
    assert errors == [None]
    return shown.getvalue()


@pytest.mark.timeout(600)
def test_a_slow_rank_is_named(material, tried):
    for where in ("data", "forward"):
        content = run_content(material, material.parent / where, growth=[], log_interval=4)
        first, second = run_processes(train_slowly, 2, content, where)
        with tried.case(where):
            assert "rank 1 on " in first and " is slow: " in first and "rank 0 on " not in first, first
            assert second == ""
    tried.note = "slow data and a slow forward pass, each named with rank and host"


@pytest.mark.timeout(600)
def test_a_hung_rank_ends_the_job_with_the_stacks_of_all(material, tried):
    for number in range(2):
        output = material.parent / f"hung{number}"
        run = Started(write_run(material, output, growth=[], watchdog_seconds=12.0, schedule=ENDLESS))
        with tried.case(f"rank {number}"):
            assert run.wait_for(lambda output=output: (output / "metrics.jsonl").exists()), run.log.read_text()[-2000:]
            time.sleep(2)
            run.ranks()[number].suspend()
            began = time.monotonic()
            code = run.command.wait(120)
            took = time.monotonic() - began
            run.close()
            shown = run.log.read_text()
            assert code == HUNG, (code, shown[-2000:])
            # The launcher gives the stopped rank 30 seconds to end.
            assert took < 12 * 1.1 + GRACE + 30 + 8, took
            assert f"rank {1 - number} on " in shown and "no progress for 12 s" in shown, shown[-3000:]
            assert (output / "stacks" / f"rank_{1 - number:05d}.txt").exists()
    tried.note = "a rank that is stopped (SIGSTOP) shows nothing itself; the others say where they wait, exit code 76"


ENDLESS = {"train_steps": 100000, "learning_rate": 1e-3, "warmup_steps": 2}
