"""Frozen tensors stay, bit for bit; the others train as in one process; such runs are saved, resumed, grown and exported."""

from pathlib import Path

import pytest
import torch
import yaml
from engine_cases import Case, reference, student
from saving_engines import train_cases
from transformers import AutoModelForCausalLM

from incr_ds.arch.architecture import saved_architecture
from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.sharding.optimizer_groups import group_count
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.checkpoints import saved_state
from incr_ds.train.start import find_start

# LLaMA-Pro's way, and with single tensors of other layers; the tied embedding, frozen, lies on two stages.
BLOCK = ("*", "!model.layers.1.*")
BLOCKS = ("*", "!model.layers.[02].*", "!*q_norm.weight")
REST = ("model.embed_tokens.weight", "model.norm.weight", "*.mlp.*", "!model.layers.2.mlp.up_proj.weight")
CASES = {
    "zero2": Case("qwen3", tied=True, data=2, zero=2, accumulation=2, freeze=BLOCK),
    "zero3": Case("qwen3", tied=False, data=2, zero=3, freeze=REST),
    "pipeline": Case("qwen3", tied=True, pipeline=2, accumulation=4, freeze=BLOCKS),
    "untied-pipeline": Case("llama", tied=False, pipeline=2, accumulation=1, recompute=True, freeze=REST),
    "tensor": Case("qwen3", tied=True, tensor=2, freeze=("model.embed_tokens.weight", "*.o_proj.weight", "*.0.*norm*")),
    "bf16": Case("qwen3", tied=True, data=2, freeze=BLOCK, precision="bf16"),
    "bf16-pipeline": Case("llama", tied=True, pipeline=2, freeze=BLOCKS[:2], precision="bf16"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_processes(train_cases, 2, str(tmp_path_factory.mktemp("frozen")), CASES)


def parts(ranks, name, key):
    for rank in ranks:
        for (tensor, bounds), value in rank[name][key].items():
            yield tensor, tuple(slice(*bound) for bound in bounds), value


def frozen_of(case):
    return frozen_tensors(student(case).architecture, case.freeze)


@pytest.mark.parametrize("name", CASES)
def test_frozen_tensors_stay_and_the_others_move(trained, name):
    case, before = CASES[name], student(CASES[name])
    for tensor, where, value in parts(trained, name, "whole"):
        same = torch.equal(value, before.read(tensor)[where].to(value.dtype))
        assert same == (tensor in frozen_of(case)), tensor
    # Moments exist for what trains only (and padding of a partition).
    held = sum(rank[name]["states"] for rank in trained)
    numel = sum(spec.numel for spec in before.architecture.stored if spec.name not in frozen_of(case))
    assert numel <= held < sum(spec.numel for spec in before.architecture.stored)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].precision == "fp32"])
def test_training_equals_one_process(trained, name):
    expected_steps, _, expected = reference(CASES[name])
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in trained[0][name]["results"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected_steps), rtol=1e-5, atol=1e-6)
    for tensor, where, value in parts(trained, name, "whole"):
        torch.testing.assert_close(
            value, expected[tensor][where], rtol=1e-5, atol=1e-5, msg=lambda text, n=tensor: n + text
        )


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_whole_one(trained, name):
    for rank in trained:
        assert rank[name]["again"] == rank[name]["results"][2:]
        assert all(torch.equal(value, rank[name]["resumed"][key]) for key, value in rank[name]["whole"].items())


@pytest.mark.parametrize("name", CASES)
def test_the_checkpoint_reads_grows_and_exports(trained, name, tmp_path):
    case, folder = CASES[name], trained[0][name]["saved"]
    checkpoint = open_source(tmp_path / folder)
    assert checkpoint.facts.frozen == tuple(sorted(frozen_of(case)))
    for tensor, where, value in parts(trained, name, "at_save"):
        assert torch.equal(checkpoint.read(tensor)[where].to(value.dtype), value), tensor
        assert checkpoint.read(tensor, "exp_avg_sq").any() == (tensor not in frozen_of(case))
    assert len(list(checkpoint.self_check())) >= len(checkpoint.architecture.stored)

    export_huggingface(checkpoint, tmp_path / "exported", torch.float32, tmp_path / folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert all(torch.equal(value, checkpoint.read(key).float()) for key, value in model.named_parameters())

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": {"num_hidden_layers": 4}}))
    grow_checkpoint(plan_request(GrowthRequest(tmp_path / folder, tmp_path / "recipe.yaml", tmp_path / "grown")))
    grown = open_source(tmp_path / "grown")
    for tensor in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(grown.read(tensor), checkpoint.read(tensor).float())


def start_from(folder, case, freeze, **model):
    run = case.run().model_dump()
    run["model"] = {"initialize_from": folder, "freeze": list(freeze), **model}
    return find_start(pico_run(**run))


def test_a_run_that_begins_from_a_frozen_one(trained):
    case, folder = CASES["pipeline"], trained[0]["pipeline"]["saved"]
    same = start_from(folder, case, case.freeze)
    assert str(same.checkpoint) == folder and same.weights is None
    more = start_from(folder, case, (*case.freeze, "model.layers.0.mlp.*"))
    assert more.with_moments and more.checkpoint is None
    with pytest.raises(
        ConfigError, match=r"model.freeze: model.embed_tokens.weight and \d+ other tensors .* have no moments"
    ):
        start_from(folder, case, ())
    assert start_from(folder, case, (), load_optimizer=False).weights is not None


def test_another_freeze_does_not_resume(trained):
    case, folder = CASES["zero2"], trained[0]["zero2"]["saved"]
    run = case.run()
    run = run.model_copy(update={"model": run.model.model_copy(update={"freeze": []})})
    with pytest.raises(
        ConfigError, match=r"other parameter groups:\n  model.freeze: \['\*', .* there, \[\] in this run"
    ):
        saved_state(run, Path(folder), {}, saved_architecture(Path(folder) / "config.json"), run.layout)


ARCHITECTURE = pico_architecture("llama", tied=True)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["model.layer.0.*"],
            r"'model.layer.0.\*' matches no tensor; names are .* like model.embed_tokens.weight, model.l",
        ),
        (
            ["lm_head.weight"],
            r"matches no tensor; lm_head.weight is tied to model.embed_tokens.weight here .*: use that name",
        ),
        (
            ["!model.norm.weight", "*"],
            r"'!model.norm.weight' matches no tensor that an earlier pattern freezes; put it after",
        ),
        (["*"], r"model.freeze: '\*' freeze all 29 tensors, so nothing would train; add .* like '!model.norm.weight'"),
        (["*", "!model.norm.weight", "*norm*"], r"freeze all 29 tensors"),
    ],
)
def test_patterns_without_effect_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        frozen_tensors(ARCHITECTURE, patterns)


def test_the_last_pattern_decides():
    found = frozen_tensors(ARCHITECTURE, ["*", "!*.mlp.*", "*.up_proj.weight"])
    assert "model.layers.0.mlp.up_proj.weight" in found and "model.layers.0.mlp.down_proj.weight" not in found
    assert "model.norm.weight" in found and not frozen_tensors(ARCHITECTURE, [])


def test_a_stage_with_nothing_to_train_is_refused():
    frozen = frozen_tensors(ARCHITECTURE, ["*", "!model.layers.0.*"])
    with pytest.raises(LayoutError, match=r"pipeline stage 1 of 2, with decoder layers 2 to 2, has nothing to train"):
        group_count(ARCHITECTURE, ParallelLayout(pipeline_parallel=2), None, frozen)


def test_operations_of_a_frozen_model():
    whole, forward = training_flops_per_token(ARCHITECTURE, 12), forward_flops_per_token(ARCHITECTURE, 12)
    matrices = [spec for spec in ARCHITECTURE.tensors if spec.is_matrix and spec.role != "embedding"]
    layer = sum(spec.numel for spec in matrices if spec.layer == 2)
    head, scores = ARCHITECTURE.sizes["vocab"] * ARCHITECTURE.sizes["hidden"], 4 * 6 * 8 * 12
    assert whole == 3 * forward
    # The last layer alone: gradients through it and the head, and of its own matrices.
    found = training_flops_per_token(ARCHITECTURE, 12, frozen_tensors(ARCHITECTURE, ["*", "!model.layers.2.*"]))
    assert found == forward + 2 * (layer + head) + 2 * layer + 2 * scores
    only_norm = frozen_tensors(ARCHITECTURE, ["*", "!model.norm.weight"])
    assert training_flops_per_token(ARCHITECTURE, 12, only_norm) == forward + 2 * head
