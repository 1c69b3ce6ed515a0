"""Child processes of test_fp16: training in fp16 on CPUs, which compute in fp16 although DeepSpeed does not count on it."""

from pathlib import Path

import engine_cases
from progressive_runs import content_of, settings_of

from incr_ds.config.fields import merged
from incr_ds.errors import ConfigError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.runs import pico_run
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.engine import build_engine
from incr_ds.train.pretraining import train_run
from incr_ds.train.ranks import on_rank_zero

# The scale falls in the first steps, and rises after every second one that is taken.
RESTLESS = {"initial_power": 19, "window": 1, "hysteresis": 1}


def allow_fp16():
    """Only DeepSpeed's check of the processor is lifted. Everything that trains is its own."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def train_case(case):
    allow_fp16()
    return engine_cases.train(case)


def take_steps(layout, scaling, count):
    """Step results, and after each step the weights and the optimizer's step counts on this rank."""
    allow_fp16()
    run = pico_run(precision="fp16", layout=layout, loss_scaling=scaling)
    engine = build_engine(run, pico_architecture(num_key_value_heads=2), None, None)
    found = []
    for _ in range(count):
        batches = iter(engine_cases.micro_batches(run.accumulation_steps, 0))
        result = engine.train_step(batches, learning_rate=0.01)
        states = engine._engine.optimizer.optimizer.state.values()
        weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
        found.append((result, weights, {int(state["step"]) for state in states if "step" in state}))
    engine.close()
    return found


def refused_here():
    try:
        build_engine(pico_run(precision="fp16"), pico_architecture(), None, None)
    except ConfigError as error:
        return str(error)
    return None


def train_and_resume(folder, layout):
    """Six steps, the same in two parts, in three steps under another scale, and a growth of the end in fp16."""
    allow_fp16()
    folder = Path(folder)

    def start(output, **changes):
        half = {"precision": "fp16", "loss_scaling": RESTLESS, "schedule": {"train_steps": 6}, "layout": layout}
        return settings_of(content_of(folder, output, **merged(half, changes)))

    initialize_distributed(start("x").layout)
    whole = train_run(start("whole")).checkpoint
    # A checkpoint of step 3 is there: the second run continues it as after a kill.
    train_run(start("parts", schedule={"end_step": 3}))
    train_run(start("parts"))
    train_run(start("other", schedule={"end_step": 3}))
    train_run(start("other", loss_scaling={"scale": 256.0}))
    recipe = folder / "recipe.yaml"
    on_rank_zero(lambda: grow_checkpoint(plan_request(GrowthRequest(whole, recipe, folder / "grown"))))
    from_grown = {
        "model": {"config": None, "initialize_from": str(folder / "grown")},
        "schedule": {"train_steps": 1, "warmup_steps": 0},
    }
    train_run(start("after", **from_grown, loss_scaling={"scale": 1.0}))
