"""AdamW of torch and of DeepSpeed: the same steps, and checkpoints of one go on under the other."""

from types import SimpleNamespace

import pytest
import torch

from incr_ds.errors import ConfigError
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.optimizer import adapt_steps, build_adamw

CPU = torch.device("cpu")
# A large eps keeps the step a smooth function of the gradient: a wrong step count shows, rounding does not.
TORCH, DEEPSPEED = ({"implementation": name, "weight_decay": 0.2, "eps": 0.03} for name in ("torch", "deepspeed"))


def test_a_fused_adam_that_cannot_be_built_says_why(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("Unable to JIT load the fused_adam op")

    monkeypatch.setattr("deepspeed.ops.adam.FusedAdam", broken)
    expected = (
        r"optimizer.implementation: deepspeed: FusedAdam could not be built \(RuntimeError: Unable to JIT .*set torch"
    )
    with pytest.raises(ConfigError, match=expected):
        build_adamw([{"params": [torch.nn.Parameter(torch.ones(2))]}], pico_run(optimizer=DEEPSPEED), CPU)


def test_a_cpu_adam_that_cannot_be_built_says_why(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("Unable to JIT load the cpu_adam op")

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", broken)
    with pytest.raises(
        ConfigError, match=r"DeepSpeedCPUAdam could not be built \(RuntimeError: Unable to JIT .*set torch"
    ):
        run = pico_run(optimizer={**DEEPSPEED, "offload": "cpu"})
        build_adamw([{"params": [torch.nn.Parameter(torch.ones(2))]}], run, CPU)


@pytest.mark.parametrize("found", [7, 7.0, torch.tensor(7.0)])
def test_steps_get_the_type_that_the_implementation_computes_with(found):
    for settings, kind in ((TORCH, torch.Tensor), (DEEPSPEED, int)):
        states = {"first": {"step": found, "exp_avg": torch.zeros(2)}, "fresh": {}}
        adapt_steps(SimpleNamespace(state=states, defaults={"fused": None}), pico_run(optimizer=settings))
        assert isinstance(states["first"]["step"], kind) and states["first"]["step"] == 7 and states["fresh"] == {}


def steps(engine, numbers):
    for number in numbers:
        ids = torch.randint(0, 101, (2, 2, 13), generator=torch.Generator().manual_seed(number))
        engine.train_step(iter([(micro[:, :-1], micro[:, 1:]) for micro in ids]), learning_rate=0.01)
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def engine_of(settings):
    from incr_ds.train.engine import build_engine

    weights = drawn_checkpoint(pico_architecture("llama"), seed=1)
    return build_engine(pico_run(optimizer=settings), weights.architecture, weights, None)


def four_steps(first, second, folder):
    """Two steps with one implementation, saved, and two more with the other, from the file."""
    engine = engine_of(first)
    steps(engine, [0, 1])
    engine.save(folder, "step_2", {})
    engine.close()
    engine = engine_of(second)
    engine.load(folder, "step_2")
    found = steps(engine, [2, 3])
    engine.close()
    return found


@pytest.mark.slow  # DeepSpeed compiles its optimizer
def test_deepspeeds_cpu_adam_equals_torchs_on_the_host(tmp_path):
    host = [{**settings, "offload": "cpu"} for settings in (TORCH, DEEPSPEED)]
    (expected,) = run_processes(four_steps, 1, TORCH, TORCH, tmp_path / "device")
    for name, first, second in (("torch", *host), ("deepspeed", *reversed(host))):
        (found,) = run_processes(four_steps, 1, first, second, tmp_path / name, timeout=500.0)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow  # DeepSpeed compiles its optimizer
@pytest.mark.parametrize("first", [TORCH, DEEPSPEED], ids=["from torch", "from DeepSpeed"])
def test_deepspeeds_adam_equals_torchs_also_across_a_checkpoint(first, tmp_path):
    (expected,) = run_processes(four_steps, 1, TORCH, TORCH, tmp_path / "torch")
    for name, second in (("back", TORCH), ("on", DEEPSPEED)):
        (found,) = run_processes(four_steps, 1, first, second, tmp_path / name)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
