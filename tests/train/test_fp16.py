"""fp16 with DeepSpeed's loss scaling, in real engines on CPUs: losses, skipped steps, resuming, growth."""

import json

import pytest
import torch
import yaml
from engine_cases import Case, reference
from half_runs import refused_here, take_steps, train_and_resume, train_case
from token_data import write_random_documents

from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import ConfigError
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.metrics import TIMINGS, read_metrics


def test_deepspeeds_section_follows_from_the_run_file():
    dynamic = deepspeed_config(pico_run(precision="fp16", loss_scaling={"initial_power": 12, "window": 50}))
    assert dynamic["bf16"] == {"enabled": False}
    assert dynamic["fp16"] == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 50, "hysteresis": 2,
        "min_loss_scale": 1,
    }  # fmt: skip
    assert deepspeed_config(pico_run(precision="fp16", loss_scaling={"scale": 128.0}))["fp16"]["loss_scale"] == 128.0
    assert deepspeed_config(pico_run(precision="fp16"))["fp16"]["initial_scale_power"] == 16
    assert "fp16" not in deepspeed_config(pico_run())


def test_a_scale_without_fp16_is_refused():
    with pytest.raises(ConfigError, match="loss_scaling belongs to precision: fp16, not to bf16"):
        pico_run(precision="bf16", loss_scaling={})


@pytest.mark.slow
def test_a_device_without_fp16_is_refused_by_name():
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device trains in fp16")
    (message,) = run_processes(refused_here, 1)
    assert message == "precision: fp16: DeepSpeed does not train in fp16 on this device (cpu); set bf16 or fp32."


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("llama", tied=True, pipeline=2, accumulation=2, precision="fp16"),
        Case("qwen3", tied=False, tensor=2, accumulation=2, precision="fp16"),
        Case("llama", tied=False, data=2, zero=2, accumulation=2, precision="fp16"),
        Case("qwen2", tied=False, data=2, zero=3, precision="fp16"),
    ],
    ids=str,
)
def test_losses_are_those_of_fp32_up_to_rounding(case):
    """At the default first scale of 65,536, with a teacher."""
    steps, evaluations, _ = run_processes(train_case, case.world, case)[0]
    expected_steps, expected_evaluations, _ = reference(case)
    assert [step.skipped for step in steps] == [False] * 4 and {step.loss_scale for step in steps} == {65536.0}
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in steps]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected_steps), rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(evaluations), torch.tensor(expected_evaluations), rtol=2e-3, atol=0)


@pytest.mark.parametrize("layout", [{"data_parallel": 1, "zero_stage": 3}, {"pipeline_parallel": 2}], ids=str)
def test_a_step_that_overflows_changes_nothing_but_the_scale(layout):
    """2^25 is too large. The first overflow uses up the hysteresis, every later one halves the scale."""
    world = layout.get("pipeline_parallel", 1)
    for found in run_processes(take_steps, world, layout, {"initial_power": 25, "hysteresis": 2}, 10):
        skipped = [result.skipped for result, _, _ in found]
        number = skipped.index(False)
        assert number > 2 and all(skipped[:number]) and sum(skipped) < 10
        assert [result.loss_scale for result, _, _ in found[:number]] == [
            2.0**25,
            *(2.0**25 / 2**n for n in range(number - 1)),
        ]
        for (_, before, _), (result, after, _) in zip(found, found[1:], strict=False):
            same = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
            assert same == result.skipped
        # Adam's bias correction counts the steps that were taken.
        assert found[number][2] == {1} and found[-1][2] == {10 - sum(skipped)}


def test_a_scale_at_its_smallest_skips_on():
    """DeepSpeed would end with an exception. The run's own rule of divergence decides."""
    ((*_, last),) = run_processes(take_steps, 1, {}, {"initial_power": 24, "min_scale": 2**23, "hysteresis": 1}, 4)
    assert last[0].skipped and last[0].loss_scale == 2.0**23


@pytest.fixture(scope="module", params=[{"data_parallel": 2, "zero_stage": 2}, {"pipeline_parallel": 2}], ids=str)
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    write_random_documents(folder, documents=30, length=50)
    architecture = small_architecture("llama", num_hidden_layers=2, num_key_value_heads=2)
    (folder / "config.json").write_text(json.dumps(dict(architecture.config)))
    recipe = {"target": {"num_hidden_layers": 4}, "layout": request.param}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_processes(train_and_resume, 2, str(folder), request.param)
    return folder


def rows(folder, output):
    found = read_metrics(folder / output / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in TIMINGS} for item in found]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_scale_bit_for_bit(runs):
    whole = rows(runs, "whole")
    scales = [item["loss_scale"] for item in whole if item["kind"] == "train"]
    assert len(set(scales)) > 2 and whole[-1]["skipped_steps"] > 0, "the scale must move for the test to see it"
    assert rows(runs, "parts") == whole
    first, second = (open_source(runs / name / "checkpoints" / "step_00000006") for name in ("whole", "parts"))
    assert first.facts.dtype == "float16" and first.facts.step == 6 - whole[-1]["skipped_steps"]
    for spec in first.architecture.stored:
        for state in first.facts.states:
            assert torch.equal(first.read(spec.name, state), second.read(spec.name, state)), (spec.name, state)


@pytest.mark.slow
def test_another_scaling_may_be_stated_on_resume(runs):
    other = [item["loss_scale"] for item in rows(runs, "other") if item["kind"] == "train"]
    assert other[3:] == [256.0] * 3


@pytest.mark.slow
def test_a_checkpoint_in_fp16_grows_and_trains_on(runs):
    grown = open_source(runs / "grown")
    assert grown.facts.dtype == "float16" and list(grown.self_check())
    assert json.loads((runs / "grown" / "config.json").read_text())["dtype"] == "float16"
    after = [item for item in rows(runs, "after") if item["kind"] in ("evaluation", "train")]
    before = [item for item in rows(runs, "whole") if item["kind"] == "evaluation"]
    # The growth keeps the function: the first evaluation after it is the last one before it.
    assert after[0]["loss"] == pytest.approx(before[-1]["loss"], rel=1e-3)
    trained = open_source(runs / "after" / "checkpoints" / "step_00000001")
    assert trained.facts.step == grown.facts.step + 1
