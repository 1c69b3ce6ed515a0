"""Kills: of everything at once, of one rank, and in the window in which a checkpoint is saved."""

import random
import time

import pytest
from fault_runs import GROWTH, LAST, Started, assert_equal_runs, curve, newest, write_material, write_run

from incr_ds.checkpoint.publish import verify_manifest

pytestmark = pytest.mark.slow
KILLS = 30


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run that nothing disturbs, and the seconds that it took."""
    material = write_material(tmp_path_factory.mktemp("kills") / "material")
    output = material.parent / "calm"
    began = time.monotonic()
    assert Started(write_run(material, output)).end() == 0
    return material, output, time.monotonic() - began


@pytest.mark.timeout(5400)
def test_kills_of_all_processes_at_random_moments_of_a_run_that_grows(calm, tried):
    material, reference, seconds = calm
    draw, kills, runs = random.Random(17), 0, 0
    places: dict[str, int] = {}
    while kills < KILLS:
        output = material.parent / f"killed{runs}"
        run_file, mine, ended = write_run(material, output), 0, False
        runs += 1
        while not ended and kills < KILLS:
            run = Started(run_file)
            # Later kills of the same run come sooner, so that it does not end before it was killed a few times.
            run.wait_for(
                lambda: False, draw.uniform(0.3, 1.0) * seconds if mine < 6 else draw.uniform(0.5, 1.1) * seconds
            )
            ended = run.command.poll() is not None
            if not ended:
                place = _place(output)
                run.kill_all()
                kills, mine = kills + 1, mine + 1
                places[place] = places.get(place, 0) + 1
        with tried.case(f"run {runs}, killed {mine} times"):
            code = 0 if ended else Started(run_file).end()
            assert code == 0, run.log.read_text()[-3000:]
            assert_equal_runs(output, reference)
        tried.tried += mine - 1
        tried.passed += 0 if tried.failures else mine - 1
    found = ", ".join(f"{count} {place}" for place, count in sorted(places.items()))
    tried.note = f"{runs} runs with two ranks and a growth; killed at: {found}; curves, weights and moments bit for bit"


def _place(output):
    if not (output / "metrics.jsonl").exists():
        return "start-up"
    if list((output / "checkpoints").glob(".step_*")):
        return "a save"
    rows = curve(output)
    step = rows[-1]["step"] if rows else 0
    return "the growth" if step == GROWTH else "a step"


@pytest.mark.timeout(900)
def test_one_killed_rank_ends_the_job(calm, tried):
    material, reference, _ = calm
    slowest = 0.0
    for number, step in enumerate((2, 7, 13)):
        output = material.parent / f"rank{number}"
        run_file = write_run(material, output)
        with tried.case(f"rank {number % 2} at step {step}"):
            run = Started(run_file)
            assert run.wait_for(lambda output=output, step=step: _has_step(output, step)), run.log.read_text()[-2000:]
            run.ranks()[number % 2].kill()
            began = time.monotonic()
            code = run.command.wait(60)
            slowest = max(slowest, time.monotonic() - began)
            assert code != 0 and slowest < 15 and not run.left(), (code, slowest, run.left())
            assert Started(run_file).end() == 0
            assert_equal_runs(output, reference)
    tried.note = f"the command ended after at most {slowest:.1f} s, without orphans; the run resumed bit for bit"


def _has_step(output, step):
    return (output / "metrics.jsonl").exists() and any(row["step"] >= step for row in curve(output))


@pytest.mark.timeout(900)
def test_a_kill_while_a_checkpoint_is_saved_leaves_the_one_before(calm, tried):
    material, reference, _ = calm
    for number, step in enumerate((6, GROWTH, LAST)):
        output = material.parent / f"save{number}"
        run_file = write_run(material, output, checkpoint={"interval": 3, "keep_last": 2, "background": number == 1})
        with tried.case(f"save of step {step}"):
            run = Started(run_file)
            name = f".step_{step:08d}.incomplete-*"
            seen = run.wait_for(lambda output=output, name=name: list((output / "checkpoints").glob(name)))
            if seen:
                run.kill_all()
            before = newest(output)
            assert before is not None
            verify_manifest(before)
            assert Started(run_file).end() == 0
            assert not list((output / "checkpoints").glob(".step_*"))
            assert_equal_runs(output, reference)
    tried.note = "the newest checkpoint is whole, the unfinished one is removed, and the run resumes bit for bit"
