"""Child processes of tests with many cases, every one of a group in the same processes, saved on the way and resumed; and
what such tests compare."""

from pathlib import Path

import deepspeed
import torch
from engine_cases import RATE, SCHEDULE, Case, assert_pieces, micro_batches, pieces, reference, student, teacher
from resuming_engines import load_own

from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.checkpoints import TrainingState, save_checkpoint
from incr_ds.train.engine import build_engine
from incr_ds.train.metrics import Position
from incr_ds.train.start import find_start

SAVED = 2  # steps before the checkpoint


def trained_in_groups(cases, slow, folder):
    """A function that gives what the ranks found in a case, by its name.

    The cases of a default run, and the ``slow`` ones, are one group of processes each, which runs when it is first asked for.
    """
    known = {}

    def ranks(name):
        is_slow = name in slow
        if is_slow not in known:
            group = {other: cases[other] for other in cases if (other in slow) == is_slow}
            known[is_slow] = run_processes(train_cases, 2, str(folder), group)
        return [rank[name] for rank in known[is_slow]]

    return ranks


def assert_trains_as_one_process(case, ranks):
    """Losses, gradient norms and final weights are those of one process. Returns its held-out means."""
    steps, evaluations, expected = reference(case)
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in ranks[0]["results"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(steps), rtol=1e-5, atol=1e-6)
    assert_pieces(expected, [rank["whole"] for rank in ranks])
    return evaluations


def assert_resumes_and_is_read(ranks):
    """The resumed run is the whole one bit for bit, and every tensor of its checkpoint is read. Returns the checkpoint."""
    for rank in ranks:
        assert rank["again"] == rank["results"][SAVED:]
        assert all(torch.equal(value, rank["resumed"][key]) for key, value in rank["whole"].items())
    checkpoint = open_source(Path(ranks[0]["saved"]))
    for rank in ranks:
        for (tensor, bounds), value in rank["at_save"].items():
            assert torch.equal(checkpoint.read(tensor)[tuple(slice(*bound) for bound in bounds)], value), tensor
    return checkpoint


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
