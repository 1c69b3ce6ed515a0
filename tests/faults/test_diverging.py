"""One rank whose numbers are not finite, or whose loss jumps: all ranks skip, go back or end together, and say on what."""

from contextlib import redirect_stdout
from io import StringIO

import pytest
from fault_runs import LAST, run_content, states, train_each, write_material

from incr_ds.testing.processes import run_processes
from incr_ds.train.metrics import FILE, read_metrics

pytestmark = pytest.mark.slow
MICRO_BATCHES = 2
SPIKE = {"action": "roll_back", "max_roll_backs": 2, "max_loss_rise": 2.0, "rise_steps": 2, "max_skipped_steps": 3}
CASES = {  # what the head's input on rank 1 is multiplied by, in which steps, counted from 0; and divergence
    "a step that is not finite": (float("nan"), {7}, SPIKE),
    "an infinite step": (float("inf"), {7}, SPIKE),
    "3 steps that are not finite": (float("nan"), {7, 8, 9}, SPIKE),
    "3 steps that are not finite, and stop": (float("nan"), {7, 8, 9}, {**SPIKE, "action": "stop"}),
    "a loss that jumps": (1000.0, {7, 8, 9, 10}, SPIKE),
    "steps that are never finite again": (float("nan"), set(range(7, 60)), SPIKE),
}


def train_disturbed(folder, cases):
    """Train each case. Returns, by name, the error or None and what this rank printed."""
    import os

    from incr_ds.model import plain

    whole, calls, plan = plain.head_input, [0], {"factor": 1.0, "steps": ()}

    def disturbed(*arguments):
        step = calls[0] // MICRO_BATCHES
        calls[0] += 1
        factor = plan["factor"] if os.environ["RANK"] == "1" and step in plan["steps"] else 1.0
        return whole(*arguments) * factor

    plain.head_input, found = disturbed, {}
    for number, (name, (factor, steps, divergence)) in enumerate(cases.items()):
        calls[0], plan["factor"], plan["steps"] = 0, factor, steps
        content = run_content(folder, folder.parent / f"run{number}", growth=[], evaluation=None, divergence=divergence)
        with redirect_stdout(StringIO()) as shown:
            (error,) = train_each([content])
        found[name] = error, shown.getvalue()
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    material = write_material(tmp_path_factory.mktemp("diverging") / "material")
    return material.parent, run_processes(train_disturbed, 2, material, CASES, timeout=900.0)


def rows_of(folder, name, kind):
    rows = read_metrics(folder / f"run{list(CASES).index(name)}" / FILE)
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.timeout(1200)
def test_numbers_that_are_not_finite_on_one_rank(world, tried):
    folder, (first, second) = world
    for name in ("a step that is not finite", "an infinite step"):
        with tried.case(name):
            error, shown = first[name]
            assert error is None and second[name][0] is None, error
            assert "step 8: not finite" in shown and "on samples 28 to 31; the step was skipped" in shown, shown
            assert [row["step"] for row in rows_of(folder, name, "train") if row["skipped"]] == [8]
            assert rows_of(folder, name, "train")[-1]["step"] == LAST
            assert rows_of(folder, name, "train")[-1]["skipped_steps"] == 1
            assert all(value.isfinite().all() for value in states(folder / f"run{list(CASES).index(name)}").values())
    with tried.case("3 steps that are not finite"):
        error, shown = first["3 steps that are not finite"]
        assert error is None and "went back from step 10 and skips samples 24 to 39 (roll-back 1)" in shown, shown
        (row,) = rows_of(folder, "3 steps that are not finite", "roll_back")
        assert (row["step"], row["from_step"]) == (6, 10)
        assert rows_of(folder, "3 steps that are not finite", "train")[-1]["step"] == LAST
    with tried.case("3 steps that are not finite, and stop"):
        for found in (first, second):
            error, _ = found["3 steps that are not finite, and stop"]
            assert "DivergedError: step 10" in error and "max_skipped_steps" in error, error
    with tried.case("steps that are never finite again"):
        error, _ = first["steps that are never finite again"]
        assert "It went back 2 time(s)" in error and "max_roll_backs" in error, error
    tried.note = (
        "skipped on all ranks with the samples named; three in a row: back to the last good checkpoint, or the end"
    )


@pytest.mark.timeout(1200)
def test_a_loss_that_jumps_on_one_rank(world, tried):
    folder, (first, _) = world
    with tried.case("a loss that jumps"):
        error, shown = first["a loss that jumps"]
        assert error is None, error
        (row,) = rows_of(folder, "a loss that jumps", "roll_back")
        assert "the loss rose" in row["reason"] and f"skips samples {row['first_sample']} to " in shown, (row, shown)
        losses = [row["loss"] for row in rows_of(folder, "a loss that jumps", "train")]
        assert len(losses) == LAST and max(losses) < 6, losses
    tried.note = "went back to the last good checkpoint, and the samples were skipped and named; the curve has no jump"
