"""Signals to the command, the launcher and a rank, in every phase: saved or cleanly ended, no orphans, then resumed."""

import itertools
import re
import signal
import time

import psutil
import pytest
from fault_runs import GROWTH, Started, assert_equal_runs, curve, write_material, write_run

from incr_ds.launch.stopping import STOPPED

pytestmark = pytest.mark.slow
OUR_TRACEBACK = re.compile(r'^  File ".*(launchers|incr_ds)/', re.MULTILINE)  # DeepSpeed's launcher may print its own
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def has_row(output, kind, step):
    return (output / "metrics.jsonl").exists() and any(r["kind"] == kind and r["step"] >= step for r in curve(output))


PHASES = {
    "start-up": lambda run, output: len(run.ranks()) == 2,
    "training": lambda run, output: has_row(output, "train", 2),
    "saving": lambda run, output: bool(list((output / "checkpoints").glob(".step_*"))),
    "evaluating": lambda run, output: has_row(output, "train", 6),
    "growing": lambda run, output: has_row(output, "evaluation", GROWTH),
}
TARGETS = {
    "command": lambda run: psutil.Process(run.command.pid),
    "launcher": lambda run: psutil.Process(run.command.pid).children()[0],
    "rank 1": lambda run: run.ranks()[1],
}


def expected_codes(target, phase, sent):
    """What the deepspeed command may return.

    It ends by a signal that it gets itself. When its launcher ends by one, it returns 0 or 1. Otherwise it returns what the
    rank that ended first did: STOPPED, or, before the rank's handlers are there, minus the signal, or 1 by Python's own handler.
    """
    if target == "command":
        return {-sent}
    if target == "launcher":
        return {0, 1}
    return {STOPPED, 256 - sent, 1} if phase == "start-up" else {STOPPED}


@pytest.mark.timeout(3000)
def test_signals_in_every_phase(tmp_path, tried):
    material = write_material(tmp_path / "material")
    calm = tmp_path / "calm"
    assert Started(write_run(material, calm)).end() == 0
    signals, codes = itertools.cycle(SIGNALS), {name: set() for name in TARGETS}
    for number, (phase, target) in enumerate(itertools.product(PHASES, TARGETS)):
        output, sent = tmp_path / f"run{number}", next(signals)
        run_file = write_run(material, output)
        run = Started(run_file)
        with tried.case(f"{sent.name} to the {target} while {phase}"):
            seen = run.wait_for(lambda run=run, output=output, phase=phase: PHASES[phase](run, output))
            assert seen, run.log.read_text()[-2000:]
            TARGETS[target](run).send_signal(sent)
            code = run.command.wait(90)
            deadline = time.monotonic() + 45
            while run.left() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not run.left(), run.left()
            codes[target].add(code)
            assert code in expected_codes(target, phase, sent), (code, run.log.read_text()[-1500:])
            assert phase == "start-up" or not OUR_TRACEBACK.search(run.log.read_text()), run.log.read_text()[-1500:]
            assert Started(run_file).end() == 0
            assert_equal_runs(output, calm)
        run.close()
    listed = "; ".join(f"{target}: {sorted(found)}" for target, found in codes.items())
    tried.note = f"{len(PHASES)} phases x {len(TARGETS)} processes, exit codes {listed}; resumed bit for bit"
