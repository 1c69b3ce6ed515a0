"""Child processes of test_progressive: runs that grow on the way, and the same training as commands of their own."""

import os
import signal
import weakref
from pathlib import Path

import yaml

from incr_ds.config.fields import merged, parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import IncrError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.train import checkpoints, loop, pretraining
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.pretraining import train_run
from incr_ds.train.ranks import on_rank_zero

LENGTH = 16
GROWTH, LAST = 4, 8  # steps


def content_of(folder, output, **changes):
    """The content of a run file; ``changes`` are merged section by section."""
    folder = Path(folder)
    content = {
        "output": str(folder / output),
        "seed": 5,
        "precision": "fp32",
        "model": {"config": str(folder / "config.json")},
        "layout": {"data_parallel": 2, "zero_stage": 1},
        "batch": {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 4},
        "schedule": {"train_steps": LAST, "learning_rate": 1e-2, "warmup_steps": 2},
        "data": {
            "train": [{"prefix": str(folder / "x_train_text_document")}],
            "validation": str(folder / "x_validation_text_document"),
            "start_sample": 8,
        },
        "evaluation": {"interval": 3, "samples": 8},
        "checkpoint": {"interval": 3, "keep_last": 0},
        "log_interval": 1,
        "tensorboard": False,
    }
    if "layout" in changes:  # replaced as a whole
        content["layout"] = {}
    return merged(content, changes)


def settings_of(content):
    return parse_settings(content, RunSettings, "test")


def growth(folder, **changes):
    step = {"at_step": GROWTH, "recipe": str(Path(folder) / "recipe.yaml"), "rewarmup_steps": 2, "rewarmup_from": 0.25}
    return [step | changes]


def train_both_ways(folder, cases):
    """Each case in one run that grows, then as three commands: train to the growth, grow, train on. A case is changes."""
    initialize_distributed(settings_of(content_of(folder, "")).layout)
    for name, changes in cases.items():
        one, three = f"{name}/one", f"{name}/three"
        train_run(settings_of(content_of(folder, one, **changes, growth=growth(folder))))
        first = merged({**changes, "distillation": None}, {"schedule": {"end_step": GROWTH}})
        small = train_run(settings_of(content_of(folder, f"{three}/small", **first))).checkpoint
        grown = Path(folder) / three / "grown"
        on_rank_zero(lambda small=small, grown=grown, changes=changes: grow(folder, small, grown, changes))
        train_run(settings_of(later(folder, f"{three}/large", changes, grown, small)))


def later(folder, output, changes, grown, teacher):
    """The run file of the third command."""
    content = content_of(folder, output, **changes)
    content["model"] = {**content["model"], "config": None, "initialize_from": str(grown)}
    content["schedule"] |= {"start_step": GROWTH, "rewarmup_steps": 2, "rewarmup_from": 0.25}
    if content.get("distillation"):
        content["distillation"] = {**content["distillation"], "teacher": str(teacher)}
    return content


def grow(folder, source, target, changes):
    recipe = yaml.safe_load((Path(folder) / "recipe.yaml").read_text())
    path = target.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, "layout": changes.get("layout", {"data_parallel": 2})}))
    grow_checkpoint(plan_request(GrowthRequest(Path(source), path, target)))


def train(folder, output, changes):
    """One run. Returns where it ended."""
    run = settings_of(content_of(folder, output, **changes))
    initialize_distributed(run.layout)
    return train_run(run).position


def train_all(folder, cases):
    """Several runs, by name, one after the other. Each stage of a run must leave no engine behind."""
    alive, build = [], pretraining.build_engine

    def watched(*arguments):
        assert not [engine for engine in alive if engine() is not None]
        engine = build(*arguments)
        alive.extend(weakref.ref(part) for part in (engine._engine, engine.module, engine._engine.optimizer))
        return engine

    pretraining.build_engine = watched
    for name, changes in cases.items():
        alive.clear()
        train(folder, name, changes)


def train_until_killed(folder, output, changes, when):
    """One run in which a process is killed (SIGKILL) at ``when``: (``point``, step)."""
    point, step = when
    rank = int(os.environ["RANK"])
    if point == "step":  # after the step, before it is evaluated and saved
        kill_after(loop, "train_step", lambda result: result[0].position.step == step and rank == 1)
    elif point == "save":  # all ranks have written; nothing is published
        kill_before(checkpoints, "_write_companions", lambda _, tag, *rest: tag == f"global_step{step}")
    elif point == "build":  # the large model
        kill_before(pretraining, "build_engine", lambda run, *rest: run.schedule.start_step == step and rank == 1)
    elif point == "fill":  # its masters and moments; the run resumes right at the growth, so that it is the first call
        kill_after(pretraining, "load_start", lambda _: rank == 0)
    elif point == "evaluate":  # after the row of the growth
        kill_before(loop, "evaluate_if_due", lambda job, state: job.stage == 1 and rank == 0)
    train(folder, output, changes)


def kill_before(module, name, condition):
    wrapped = getattr(module, name)

    def killing(*arguments):
        if condition(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return wrapped(*arguments)

    setattr(module, name, killing)


def kill_after(module, name, condition):
    wrapped = getattr(module, name)

    def killing(*arguments):
        result = wrapped(*arguments)
        if condition(result):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, killing)


def refusal(run):
    """Train, and return the message of the refusal, or None."""
    try:
        train_run(run)
    except IncrError as error:
        return str(error)
    return None
