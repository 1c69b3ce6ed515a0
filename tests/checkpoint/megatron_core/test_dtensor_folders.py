"""What is read from folders of the formats fsdp_dtensor and torch_dcp, and what is refused. torch itself writes the files."""

import json
from pathlib import Path

import pytest
import torch
from commands import run_tool
from dtensor_folders import GROUP, WRAPPED, by_parameter, content_of, content_of_torch_dcp, write
from truths import same, same_values, truth

from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import CheckpointError


def unpadded():
    """A truth whose vocabulary needs no padding, which a checkpoint without vocab_size could not tell from tokens."""
    return truth(vocab_size=104)


@pytest.mark.parametrize("step_in_groups", [True, False])
@pytest.mark.parametrize("wrapped", [WRAPPED, "module.module."])
def test_masters_moments_step_and_config_are_read(tmp_path: Path, step_in_groups: bool, wrapped: str):
    """The step is in the groups under fused Adam, and among the states under torch's; fp32 has a wrapper less."""
    source = unpadded()
    inner = write(tmp_path, content_of(source, step_in_groups, wrapped, tensor_model_parallel_size=2))
    found = open_source(tmp_path)
    assert found.architecture.sizes == source.architecture.sizes
    assert (found.facts.kind, found.facts.dtype) == ("Megatron-core fsdp_dtensor", "float32")
    assert (found.facts.layout, found.facts.recorded.global_steps) == ({"tensor_parallel": 2}, 7)
    assert found.facts.optimizer_groups == ({"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "betas": (0.9, 0.95)},)
    same(found, source)
    same(open_source(inner), source)
    assert set(found.self_check()) == {spec.name for spec in source.architecture.stored}


def test_masters_beside_the_weights_are_read(tmp_path: Path):
    """They are there after Megatron-LM's conversion from torch_dist, whose groups are numbered."""
    source = unpadded()
    content = content_of(source)
    content["model"] = {name: tensor.bfloat16() for name, tensor in content["model"].items()}
    for name, tensor in by_parameter(source, "weight").items():
        content["optimizer"]["state"][WRAPPED + name]["param"] = tensor
    del content["optimizer"]["param_to_group_meta"]
    content |= {f"optimizer.param_groups.0.{name}": value for name, value in (GROUP | {"step": 100}).items()}
    write(tmp_path, content)
    found = open_source(tmp_path)
    assert found.facts.dtype == "bfloat16"
    same(found, source)


def test_the_weights_of_torch_dcp_are_read(tmp_path: Path):
    source = unpadded()
    write(tmp_path, content_of_torch_dcp(source))
    found = open_source(tmp_path)
    assert (found.facts.kind, found.facts.states) == ("Megatron-core torch_dcp", ("weight",))
    assert "numbers the parameters in the optimizer's state" in found.facts.no_moments
    same_values(found, source, ("weight",))


def in_fp16(content):
    for states in content["optimizer"]["state"].values():
        states |= {state: states[state].half() for state in STATES[1:]}


def without_optimizer(content):
    del content["optimizer"]


REASONS = {
    "the moments are saved as float16, without the scales": in_fp16,
    "it was saved without the optimizer": without_optimizer,
}


@pytest.mark.parametrize("reason", REASONS)
def test_weights_are_read_where_moments_cannot_be(tmp_path: Path, reason: str):
    source = unpadded()
    content = content_of(source)
    REASONS[reason](content)
    write(tmp_path, content)
    found = open_source(tmp_path)
    assert found.facts.states == ("weight",) and reason in found.facts.no_moments
    same_values(found, source, ("weight",))


def in_a_pipeline(content):
    content["args"].pipeline_model_parallel_size = 2


def under_tensor_ranks_of_torch_fsdp(content):
    content["args"].tensor_model_parallel_size = 2
    content["model"] = {name.removeprefix("module."): tensor for name, tensor in content["model"].items()}


def of_another_step(content):
    content["optimizer"]["param_to_group_meta"][WRAPPED + "decoder.final_layernorm.weight"] = GROUP | {"step": 99}


def without_a_layer(content):
    del content["model"]["module.decoder.layers.1.mlp.linear_fc1.weight_v"]


def with_another_parameter(content):
    content["model"]["module.decoder.layers.0.mlp.router.expert_bias"] = torch.ones(3)


def named_twice(content):
    content["model"]["module.module.output_layer.weight"] = torch.ones(3)


def without_arguments(content):
    del content["args"]


def of_another_model(content):
    content["model"] = {"module.conv.weight": torch.ones(3)}


def of_torch_dist(content):
    content["embedding.word_embeddings.weight"] = torch.ones(104, 8)
    del content["model"]


REFUSED = {
    "pipeline": (
        in_a_pipeline,
        "args.pipeline_model_parallel_size: 2, and with --ckpt-format fsdp_dtensor these ranks",
    ),
    "tensor ranks": (under_tensor_ranks_of_torch_fsdp, "args.tensor_model_parallel_size: 2, and .* torch_dcp"),
    "steps": (of_another_step, r"several steps of Adam: \[99, 100\]"),
    "layer": (without_a_layer, "decoder.layers.1.mlp.linear_fc1.weight: missing"),
    "parameter": (with_another_parameter, "decoder.layers.0.mlp.router.expert_bias: not a parameter of this llama"),
    "names": (named_twice, "another key names the same parameter output_layer.weight; expected one"),
    "arguments": (without_arguments, r"\.metadata: holds no arguments of Megatron-LM.* with --config FILE"),
    "model": (of_another_model, "no key embedding.word_embeddings.weight; only models of the class GPTModel"),
    "incomplete": (of_torch_dist, r"\.metadata without metadata\.json, and no key starts with 'model\.'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(tmp_path: Path, name: str):
    change, message = REFUSED[name]
    content = content_of(unpadded())
    change(content)
    write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_a_damaged_chunk_is_found(tmp_path: Path):
    inner = write(tmp_path, content_of(unpadded()))
    path = next(inner.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    numbers = by_parameter(unpadded(), "weight")["output_layer.weight"].numpy().tobytes()
    content[content.index(numbers) + 11] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"record .* is damaged \(its CRC-32 is"):
        list(open_source(tmp_path).self_check())


@pytest.mark.slow
def test_the_commands_take_such_a_folder(tmp_path: Path):
    source = unpadded()
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "checkpoints", content_of(source))
    (tmp_path / "recipe.yaml").write_text("target: {}\nlayout: {format: torch_dist, dtype: float32}\n")
    shown = json.loads(run_tool("inspect_checkpoint", tmp_path / "checkpoints", "--json").stdout)
    assert (shown["kind"], shown["step"]) == ("Megatron-core fsdp_dtensor", 100)
    paths = ("--source", tmp_path / "checkpoints", "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "grown")
    done = run_tool("grow_checkpoint", *paths)
    assert done.returncode == 0, done.stderr
    same(open_source(tmp_path / "grown"), source)
    done = run_tool("export_huggingface", tmp_path / "checkpoints", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    exported = open_source(tmp_path / "exported")
    same_values(exported, source, ("weight",))
