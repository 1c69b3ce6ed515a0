"""Child processes of test_resharding: runs, and resumed runs of other layouts, that report what they read and loaded."""

import shutil
from pathlib import Path

import torch
from progressive_runs import content_of, kill_after, settings_of

from incr_ds.checkpoint.deepspeed.reader import ZeroCheckpoint
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import IncrError
from incr_ds.testing.processes import run_processes
from incr_ds.train import loop, pretraining
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.pretraining import train_run
from incr_ds.train.ranks import all_ranks, on_rank_zero


class Watched:
    """Samples that keep the numbers of those that were read."""

    def __init__(self, samples):
        self.samples, self.numbers = samples, []

    def tokens(self, number):
        self.numbers.append(number)
        return self.samples.tokens(number)


def run_all(folder, legs):
    """Train each leg, one after the other, in one group. Returns the result of each, by name."""
    return {name: run_leg(Path(folder), name, **leg) for name, leg in legs.items()}


def run_leg(folder, name, *, changes, source=None, step=None, compare=True, needs=()):
    """Train a run, from the checkpoint after ``step`` of the output ``source`` if one is given.

    Returns the lines of the run, the numbers of the samples that it read, and what in its engine differs from ``source``.
    ``needs`` are steps of other checkpoints of it.
    """
    run = settings_of(content_of(folder, name, tensorboard=False, **changes))
    initialize_distributed(run.layout)
    if source:
        on_rank_zero(lambda: [begin_from(folder / source, folder / name, number) for number in (*needs, step)])
    watched, lines, differences = [], [], []
    saved = pretraining.train, loop.batches, pretraining.open_monitor

    def train(job, state, newest, stop):
        if source and compare and not differences:
            differences.append(compare_engine(job, newest, folder / f"{name}_loaded", state))
        return saved[0](job, state, newest, stop)

    def batches(samples, *rest):
        watched.append(Watched(samples))
        return saved[1](watched[-1], *rest)

    def open_monitor(*arguments):
        monitor = saved[2](*arguments)
        monitor.say = lines.append
        return monitor

    pretraining.train, loop.batches, pretraining.open_monitor = train, batches, open_monitor
    try:
        train_run(run)
    except IncrError as error:
        return {"error": type(error).__name__, "text": str(error)}
    finally:
        pretraining.train, loop.batches, pretraining.open_monitor = saved
    read = all_ranks().gather([number for samples in watched for number in samples.numbers])
    return {"lines": lines, "read": sorted({n for numbers in read for n in numbers}), "differences": differences[:1]}


def begin_from(source, output, step):
    """What a run has that was killed after ``step``."""
    name = f"checkpoints/step_{step:08d}"
    shutil.copytree(source / name, output / name)
    shutil.copyfile(source / "metrics.jsonl", output / "metrics.jsonl")


def compare_engine(job, newest, folder, state):
    """What differs between a checkpoint and what DeepSpeed saves of the engine that has just loaded it."""
    tag = f"global_step{state.position.step}"
    on_rank_zero(lambda: folder.mkdir())
    job.engine.save(folder, tag, {})
    return on_rank_zero(lambda: differing(open_source(newest), ZeroCheckpoint(folder, tag, job.architecture)))


def differing(first, second):
    for _ in second.self_check():
        pass
    facts = [facts_of(checkpoint) for checkpoint in (first, second)]
    unlike = [] if facts[0] == facts[1] else facts
    for spec in first.architecture.stored:
        for state in first.facts.states_of(spec.name):
            if not torch.equal(first.read(spec.name, state), second.read(spec.name, state)):
                unlike.append((spec.name, state))
    return unlike


def facts_of(checkpoint):
    facts, recorded = checkpoint.facts, checkpoint.facts.recorded
    return (
        facts.step,
        facts.frozen,
        facts.states,
        facts.momentum,
        recorded.global_steps,
        recorded.global_samples,
        recorded.skipped_steps,
    )


def killed_leg(folder, name, changes, step):
    """Continue a run, and be killed after ``step`` before it is saved."""
    kill_after(loop, "train_step", lambda result: result[0].position.step == step)
    run = settings_of(content_of(folder, name, tensorboard=False, **changes))
    initialize_distributed(run.layout)
    train_run(run)


def run_group(folder, size, legs):
    """``run_all`` in a new group of ``size`` processes. Returns the results of rank 0."""
    return run_processes(run_all, size, str(folder), legs, timeout=600.0)[0]
