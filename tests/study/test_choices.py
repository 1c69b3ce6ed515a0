"""What to train for a number of FLOPs: the accounting of every way, and the messages of the command."""

import json
import math

import pytest
from commands import run_tool

from incr_ds.arch.flops import training_flops_per_token
from incr_ds.errors import ConfigError
from incr_ds.study.choices import Model, choices
from incr_ds.study.forecast import law_loss, predict_saving
from incr_ds.testing.memory import drawn_model, small_architecture

FLOPS = 1e19
GOAL = Model(4e8, 2.5e9)
SOURCE = Model(2.2e8, 1.3e9, 1e9)


def by_name(*arguments):
    return {choice.name: choice for choice in choices(*arguments)}


def test_every_way_spends_what_is_given():
    for source, target in ((None, None), (None, GOAL), (SOURCE, None), (SOURCE, GOAL)):
        found = choices(FLOPS, source, target)
        assert [choice.spent for choice in found] == pytest.approx([FLOPS] * len(found))
        assert [choice.loss for choice in found] == sorted(choice.loss for choice in found)


def test_a_small_model_first_costs_half_of_the_tokens_at_half_of_the_price():
    grown = by_name(FLOPS, None, GOAL)["train a small model, then grow it"]
    tokens = FLOPS / (0.5 * GOAL.flops_per_token / 2 + 0.5 * GOAL.flops_per_token)
    assert [stage.tokens for stage in grown.stages] == pytest.approx([tokens / 2, tokens / 2])
    assert [stage.model.parameters for stage in grown.stages] == [2e8, 4e8]
    saving = predict_saving(FLOPS)
    assert grown.equivalent == pytest.approx(FLOPS / saving.ratio)
    assert grown.loss == pytest.approx(law_loss(4e8, FLOPS / saving.ratio / GOAL.flops_per_token))
    assert grown.low < grown.loss < grown.high
    assert grown.tokens_per_parameter == pytest.approx(tokens / 4e8)


def test_a_source_counts_with_what_its_training_cost():
    grown = by_name(FLOPS, SOURCE, GOAL)["grow the source"]
    whole = FLOPS + 1e9 * 1.3e9
    assert grown.equivalent == pytest.approx(whole / predict_saving(whole).ratio)
    further = by_name(FLOPS, SOURCE, GOAL)["train the source further"]
    assert further.loss == pytest.approx(law_loss(2.2e8, 1e9 + FLOPS / 1.3e9))


def test_training_of_a_source_beyond_the_measured_share_is_not_counted():
    much = Model(2.2e8, 1.3e9, 1e12)
    grown = by_name(FLOPS, much, GOAL)["grow the source"]
    whole = FLOPS * (1 + 0.5 * 1.3e9 / (0.5 * 2.5e9))
    assert grown.equivalent == pytest.approx(whole / predict_saving(whole).ratio)


def test_impossible_requests_are_refused():
    with pytest.raises(
        ConfigError, match=r"the target has 400,000,000 parameters, the source 400,000,000; growth only adds"
    ):
        choices(FLOPS, GOAL, GOAL)
    with pytest.raises(
        ConfigError, match=r"1e\+09 FLOPs are less than one token of the target costs \(2.5e\+09\); give more"
    ):
        choices(1e9, None, GOAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--flops and --gpu-hours: state one of the two"),
        (["--flops", "1e18", "--gpu-hours", "3"], "--flops and --gpu-hours: state one of the two"),
        (["--flops", "0"], "--flops: expected a number above 0"),
        (["--gpu-hours", "3", "--gpu", "Z80"], "--gpu Z80: expected one of B200"),
        (["--gpu-hours", "3", "--gpu", "H100", "--mfu", "40"], "--mfu 40: expected a share of the peak"),
        (["--flops", "1e18", "--target", "nowhere.json"], "nowhere.json"),
        (["--flops", "1e18", "--mfu", "0.5"], "--gpu and --mfu: they have no effect without --gpu-hours"),
        (["--flops", "1e18", "--source-tokens", "1e9"], "--source-tokens: has no effect without --source"),
    ],
)
def test_mistakes_of_the_command_line(options, message):
    done = run_tool("plan_growth", *options)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_source_is_read_from_its_folder(tmp_path):
    """A Hugging Face folder does not state its tokens. The default target has twice the source's parameters and FLOPs."""
    architecture = small_architecture("llama")
    drawn_model(architecture).float().save_pretrained(tmp_path)
    options = ["plan_growth", "--flops", "1e15", "--source", tmp_path, "--sequence-length", "64"]
    done = run_tool(*options)
    assert done.returncode == 2 and "it does not state on how many tokens it was trained" in done.stderr
    done = run_tool(*options, "--source-tokens", "-3")
    assert done.returncode == 2 and "trained on -3 tokens: expected a number above 0" in done.stderr
    found = json.loads(run_tool(*options, "--source-tokens", "1e8", "--json").stdout)["choices"]
    models = {choice["name"]: choice["stages"][-1]["model"] for choice in found}
    per_token = training_flops_per_token(architecture, 64)
    assert models["train the source further"] == {
        "parameters": architecture.num_parameters,
        "flops_per_token": per_token,
        "tokens": 1e8,
    }
    assert models["grow the source"]["flops_per_token"] == 2 * per_token


def test_hours_are_peak_times_mfu():
    done = run_tool("plan_growth", "--gpu-hours", "10", "--gpu", "A100", "--mfu", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    assert math.isclose(json.loads(done.stdout)["flops"], 10 * 3600 * 312e12 * 0.5)
