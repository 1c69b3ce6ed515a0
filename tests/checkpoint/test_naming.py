"""Tensor names as other programs write them: without the base model's prefix, inside wrappers, beside old buffers; adapters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from incr_ds.arch.family import families
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import CheckpointError
from incr_ds.testing.memory import drawn_model, small_architecture


@pytest.fixture
def published(tmp_path: Path):
    """published(family, rename, extra) -> (folder, weights): a folder whose tensors have other names."""

    def write(family, rename, extra=(), **changes):
        model = drawn_model(small_architecture(family, **changes), torch.float32)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors | {name: torch.ones(1, 1, 4, 4) for name in extra}, file)
        return tmp_path, dict(model.named_parameters())

    return write


def without_prefix(family):
    prefix = families()[family].base.partition(".")[0] + "."
    return lambda name: name.removeprefix(prefix)


@pytest.mark.parametrize("family", sorted(families()))
def test_names_without_the_base_models_prefix(published, family: str):
    """As AutoModel saves them, and as the Hub's own GPT-2 has them; with the buffers of old releases, in either spelling."""
    own = families()[family]
    inside = own.layers_path + ".0"
    buffers = [f"{inside}{ending}" for ending in own.buffers if ending.startswith(".")]
    buffers += [f"{inside}.self_attn.rotary_emb.inv_freq"]
    folder, weights = published(family, without_prefix(family), [*buffers, *map(without_prefix(family), buffers)])
    checkpoint = open_source(folder)
    assert set(checkpoint.self_check()) == {spec.name for spec in checkpoint.architecture.tensors}
    for name, weight in weights.items():
        assert torch.equal(checkpoint.read(name), weight), name


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: name.replace("mlp.", "_fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
        lambda name: f"_orig_mod.{name.removeprefix('model.')}",
    ],
)
def test_names_inside_wrappers(published, rename):
    folder, weights = published("llama", rename)
    checkpoint = open_source(folder)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.read(name), weight), name


def test_two_names_of_one_tensor_are_refused(published):
    folder, _ = published("llama", lambda name: name)
    tensors = load_file(folder / "model.safetensors")
    tensors["_orig_mod.model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"_orig_mod.model.norm.weight: not a tensor of this llama"):
        open_source(folder)


def test_an_unknown_tensor_is_an_error(published):
    folder, _ = published("gpt2", lambda name: name.removeprefix("transformer."), ["h.0.attn.rotary"])
    with pytest.raises(CheckpointError, match=r"h.0.attn.rotary: not a tensor of this gpt2"):
        open_source(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj.lora_B.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_adapter_tensors_say_that_they_must_be_merged(published, name):
    folder, _ = published("llama", lambda own: own, [name])
    with pytest.raises(
        CheckpointError, match=rf"{name}: this is an adapter \(LoRA\).*Merge it first: .*merge_and_unload"
    ):
        open_source(folder)


@pytest.mark.parametrize("with_model", [True, False])
def test_an_adapters_folder_says_that_it_must_be_merged(published, with_model):
    """With a model beside it, too: transformers would load the adapter on top."""
    folder, _ = published("llama", lambda name: name)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    if not with_model:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: this is an adapter .*Merge it first"):
        open_source(folder)
