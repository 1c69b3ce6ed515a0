"""Child processes of test_freezing and test_engine_families: every case in one group, saved on the way and resumed."""

from pathlib import Path

import deepspeed
from engine_cases import RATE, SCHEDULE, Case, micro_batches, pieces, student, teacher
from resuming_engines import load_own

from incr_ds.testing.runs import pico_run
from incr_ds.train.checkpoints import TrainingState, save_checkpoint
from incr_ds.train.engine import build_engine
from incr_ds.train.metrics import Position
from incr_ds.train.start import find_start

SAVED = 2  # steps before the checkpoint


def train_cases(folder, cases):
    """Results by case name: steps and final weights of the whole run and of the resumed one, and the checkpoint's folder."""
    found = {name: train_case(str(Path(folder) / name), case) for name, case in cases.items()}
    return found


def train_case(output, case):
    run = case.run().model_copy(update={"output": output})
    weights = student(case)
    engine = build_engine(run, weights.architecture, weights, teacher(case))
    results = steps(engine, case, range(SAVED))
    state = TrainingState(
        position=Position(step=SAVED), evaluated_step=-1, data={}, settings=run.model_dump(mode="json")
    )
    saved = save_checkpoint(engine, run, weights.architecture, state)
    at_save = values(engine, case)
    held_out = micro_batches(3 * case.data, 100)[engine.data_parallel_rank :: case.data]
    evaluation = engine.evaluate(iter(held_out), 3, taught=True)
    results += steps(engine, case, range(SAVED, len(SCHEDULE)))
    whole = values(engine, case)
    resumed = build_engine(run, weights.architecture, None, teacher(case))
    load_own(resumed, run, saved, weights.architecture)
    again = steps(resumed, case, range(SAVED, len(SCHEDULE)))
    states = sum(state["exp_avg"].numel() for state in resumed._engine.optimizer.optimizer.state.values())
    return {
        "results": results, "again": again, "saved": str(saved), "states": states, "evaluation": evaluation,
        "at_save": at_save, "whole": whole, "resumed": values(resumed, case),
    }  # fmt: skip


def steps(engine, case, numbers):
    found = []
    for step in numbers:
        alpha, temperature = SCHEDULE[step]
        mine = micro_batches(case.micro_batches, step)[engine.data_parallel_rank :: case.data]
        batches = iter(mine) if engine.reads_data else None
        found.append(engine.train_step(batches, learning_rate=RATE, alpha=alpha, temperature=temperature))
    return found


def values(engine, case):
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=case.zero == 3):
        return pieces(engine.shards, parameters)


def load_grown(folders, layouts):
    """Results by family: the first step of a run in the layout that a checkpoint was grown for."""
    found = {}
    for family, folder in folders.items():
        run = pico_run(model={"initialize_from": folder}, layout=layouts[family])
        start = find_start(run)
        assert start.checkpoint is not None
        engine = build_engine(run, start.architecture, None, None)
        engine.load(start.checkpoint, start.tag)
        found[family] = values(engine, Case(family, tied=False))
    return found
