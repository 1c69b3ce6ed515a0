"""Child processes of test_freezing: every case in one group of processes, saved on the way and resumed."""

from pathlib import Path

import deepspeed
from test_engine_layouts import RATE, SCHEDULE, micro_batches, student, teacher

from incr_ds.train.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from incr_ds.train.engine import build_engine
from incr_ds.train.metrics import Position

SAVED = 2  # steps before the checkpoint


def train_cases(folder, cases):
    """By name: step results and final weights, of the whole run and of the one that resumed, and where it was saved."""
    found = {name: train_case(str(Path(folder) / name), case) for name, case in cases.items()}
    return found


def train_case(output, case):
    run = case.run().model_copy(update={"output": output})
    weights = student(case)
    engine = build_engine(run, weights.architecture, weights, teacher())
    results = steps(engine, case, range(SAVED))
    state = TrainingState(
        position=Position(step=SAVED), evaluated_step=-1, data={}, settings=run.model_dump(mode="json")
    )
    saved = save_checkpoint(engine, run, weights.architecture, state)
    at_save = values(engine, case)
    results += steps(engine, case, range(SAVED, len(SCHEDULE)))
    whole = values(engine, case)
    resumed = build_engine(run, weights.architecture, None, teacher())
    load_checkpoint(resumed, run, saved, {})
    again = steps(resumed, case, range(SAVED, len(SCHEDULE)))
    states = sum(state["exp_avg"].numel() for state in resumed._engine.optimizer.optimizer.state.values())
    return {
        "results": results, "again": again, "saved": str(saved), "states": states,
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
        return {
            (shard.tensor.name, shard.bounds): parameter.detach().clone()
            for shard, parameter in zip(engine.shards, parameters, strict=True)
        }
