"""Growth into the format torch_dist: what torch.distributed.checkpoint and this package's reader find in it."""

import errno
import json
import pickle
import warnings
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from gpt2_parameters import stacked_parameters
from megatron_growth import planned
from sources import contents
from torch_dist_folders import PREFIX, STATES, flatten, parameters_of
from truths import same_values, truth

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.megatron_core.arguments import arguments_of
from incr_ds.checkpoint.megatron_core.configuration import config_of
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import CheckpointError, ConfigError, GrowthError, LayoutError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint, write_file
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

LAYOUT = {"format": "torch_dist", "vocabulary_multiple": 8}
GROUPED = {"num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
OWN = {
    "mistral": GROUPED | {"sliding_window": None},
    "gpt_neox": {"use_parallel_residual": False, "rope_parameters": ROPE, "hidden_act": "gelu_new"},
    "gpt2": {},
    "qwen3_moe": GROUPED | {"num_experts_per_tok": 3},
}
MASTERS = "optimizer.state.param."


def source_of(family="llama", **changes):
    return truth(family, **{**OWN.get(family, GROUPED), **changes})


def grown_into(folder, source, layout=None, **further):
    """The plan of a growth into the format of this module."""
    return planned(folder, source, LAYOUT | (layout or {}), **further)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("layout", [{"dtype": "bfloat16"}, {"dtype": "float32", "tensor_parallel": 2}], ids=str)
def test_the_reader_reads_back_what_was_written(tmp_path: Path, family, layout):
    source = source_of(family, tie_word_embeddings=family in ("qwen3", "gpt2"))
    grow_checkpoint(grown_into(tmp_path, source, layout))
    found = open_source(tmp_path / "out")
    assert found.facts.path == tmp_path / "out/iter_0000100"
    assert (found.facts.step, found.facts.recorded.global_steps) == (100, 100)
    assert found.facts.dtype == layout["dtype"]
    assert found.facts.layout == {"tensor_parallel": layout.get("tensor_parallel", 1), "pipeline_parallel": 1}
    same_values(found, source)
    assert set(found.self_check()) == {spec.name for spec in source.architecture.stored}
    (tmp_path / "out/config.json").unlink()
    again = open_source(tmp_path / "out")
    assert again.architecture.sizes == source.architecture.sizes and again.architecture.tied == source.architecture.tied
    assert again.architecture.active_experts == source.architecture.active_experts
    same_values(again, source, ("weight",))


def stored_by_torch(folder):
    """Every tensor in a folder, as torch.distributed.checkpoint loads it."""
    described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        key: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, dcp.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def mixture_parameters(source, state):
    """Those of a dense model with its FFN, and in its place the router and the experts. The norm before has two keys."""
    layers = range(source.architecture.num_layers)

    def stacked(name):
        return torch.stack([source.read(f"model.layers.{layer}.{name}.weight", state) for layer in layers])

    def expert(layer, number, names):
        inside = f"model.layers.{layer}.mlp.experts.{number}"
        return torch.cat([source.read(f"{inside}.{name}_proj.weight", state) for name in names])

    def experts(*names):
        count = source.architecture.sizes["experts"]
        return torch.stack([torch.stack([expert(layer, number, names) for number in range(count)]) for layer in layers])

    return parameters_of(source, state, with_ffn=False) | {
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": stacked("post_attention_layernorm"),
        "decoder.layers.pre_mlp_layernorm.weight": stacked("post_attention_layernorm"),
        "decoder.layers.mlp.router.weight": stacked("mlp.gate"),
        "decoder.layers.self_attention.q_layernorm.weight": stacked("self_attn.q_norm"),
        "decoder.layers.self_attention.k_layernorm.weight": stacked("self_attn.k_norm"),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": experts("gate", "up"),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": experts("down"),
    }


PARAMETERS = {"llama": parameters_of, "gpt2": stacked_parameters, "qwen3_moe": mixture_parameters}


@pytest.mark.parametrize("family", PARAMETERS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_torch_finds_each_tensor_under_megatron_s_keys(tmp_path: Path, family, tensor_parallel):
    source, parameters = source_of(family), PARAMETERS[family]
    grow_checkpoint(grown_into(tmp_path, source, {"tensor_parallel": tensor_parallel, "dtype": "bfloat16"}))
    found = stored_by_torch(tmp_path / "out/iter_0000100")
    expected = {key: tensor.bfloat16() for key, tensor in parameters(source, "weight").items()}
    for state in STATES:
        expected |= {PREFIX[state] + key: tensor for key, tensor in parameters(source, state).items()}
    expected |= {MASTERS + key: tensor for key, tensor in parameters(source, "weight").items()}
    assert set(found) == set(expected)
    vocabulary = 104 if tensor_parallel == 1 else 112
    for key, tensor in expected.items():
        padded = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        rows = 101 if padded else len(tensor)
        assert found[key].shape == ((vocabulary, *tensor.shape[1:]) if padded else tensor.shape), key
        assert torch.equal(found[key][:rows], tensor[:rows]) and not found[key][rows:].any(), key


def test_masters_have_the_bytes_of_one_copy(tmp_path: Path):
    planned_growth = grown_into(tmp_path, source_of(), {"dtype": "bfloat16"})
    parameters = planned_growth.plan.target.num_parameters + 2 * 3 * 96  # three rows of padding, twice
    assert planned_growth.num_bytes == parameters * (2 + 4 + 4 + 4)
    assert grown_into(tmp_path, source_of(), {"dtype": "float32"}).num_bytes == parameters * (4 + 4 + 4)


def common_of(folder):
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(folder / "iter_0000100/common.pt", weights_only=True)


def test_common_holds_plain_values_that_a_safe_load_accepts(tmp_path: Path):
    source = source_of("qwen3")
    grow_checkpoint(grown_into(tmp_path, source, {"dtype": "bfloat16", "tensor_parallel": 2}))
    common = common_of(tmp_path / "out")
    assert "max_lr" not in common["optimizer"]["optimizer"]["param_groups"][0]
    assert common["iteration"] == 100 and common["checkpoint_version"] == 3.0
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    decay, rest = common["optimizer"]["optimizer"]["param_groups"]
    assert (decay["wd_mult"], rest["wd_mult"], decay["step"], rest["step"]) == (1.0, 0.0, 100, 100)
    args = vars(common["args"])
    assert (args["num_query_groups"], args["kv_channels"], args["padded_vocab_size"]) == (2, 8, 112)
    assert args["qk_layernorm"] and args["no_save_rng"] and not args["add_qkv_bias"]
    assert (args["tensor_model_parallel_size"], args["params_dtype"]) == (2, torch.bfloat16)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "100"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_arguments_and_config_follow_from_each_other(family):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    source = small_architecture(family, num_key_value_heads=2, rope_parameters=rope)
    config = config_of(arguments_of(source, "test"), 104, Path("common.pt"))
    assert config["model_type"] == family
    found = architecture_from_config(config, "test")
    assert found.sizes == source.sizes and found.active_experts == source.active_experts
    fields = ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    assert {name: config[name] for name in fields} == {name: source.config[name] for name in fields}
    assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == rope


def test_hyperparameters_go_through(tmp_path: Path):
    """The run that loads a checkpoint takes Adam's betas and eps from it, so those of the source must be there."""
    source = source_of()
    decay = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.05}
    groups = ({**decay, "weight_decay": 0.0, "foreach": None}, {**decay, "amsgrad": False})
    source.facts = replace(source.facts, optimizer_groups=groups)
    grow_checkpoint(grown_into(tmp_path, source, {"learning_rates": [3e-4, 3e-5]}))
    for group in common_of(tmp_path / "out")["optimizer"]["optimizer"]["param_groups"]:
        assert (group["max_lr"], group["min_lr"]) == (3e-4, 3e-5)
    first = open_source(tmp_path / "out")
    assert first.facts.optimizer_groups == (decay, {**decay, "weight_decay": 0.0})
    grow_checkpoint(grown_into(tmp_path, first, name="again"))
    assert open_source(tmp_path / "again").facts.optimizer_groups == first.facts.optimizer_groups


def test_without_moments_a_release_holds_the_weights_alone(tmp_path: Path):
    source = source_of()
    grow_checkpoint(grown_into(tmp_path, source, {"dtype": "bfloat16"}, optimizer="reset"))
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    found = open_source(tmp_path / "out")
    assert found.facts.path.name == "release" and found.facts.states == ("weight",)
    assert found.facts.no_moments == "it was saved without the optimizer"
    same_values(found, source, ("weight",), torch.bfloat16)
    assert not any(key.startswith("optimizer.") for key in stored_by_torch(tmp_path / "out/release"))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "mixtral"])
def test_a_hugging_face_folder_comes_back_bit_for_bit(tmp_path: Path, family: str):
    export_huggingface(source_of(family), tmp_path / "first", torch.bfloat16, tmp_path / "none")
    recipe = {"target": {}, "optimizer": "reset", "layout": LAYOUT | {"dtype": "bfloat16", "tensor_parallel": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grow_checkpoint(plan_request(GrowthRequest(tmp_path / "first", tmp_path / "recipe.yaml", tmp_path / "out")))
    export_huggingface(open_source(tmp_path / "out"), tmp_path / "second", torch.bfloat16, tmp_path / "out")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0].items() <= configs[1].items()


def test_a_grown_checkpoint_has_the_same_tensors_as_in_another_format(tmp_path: Path):
    grown = {"target": {"hidden_size": 144, "num_hidden_layers": 5, "intermediate_size": 300}}
    grow_checkpoint(grown_into(tmp_path, source_of(), {"tensor_parallel": 2}, **grown))
    grow_checkpoint(grown_into(tmp_path, source_of(), {"format": "universal"}, name="universal", **grown))
    same_values(open_source(tmp_path / "out"), open_source(tmp_path / "universal"))


@pytest.mark.parametrize("layout", [{}, {"format": "torch", "tensor_parallel": 2, "pipeline_parallel": 3}], ids=str)
def test_bytes_do_not_depend_on_workers_or_on_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout):
    grow_checkpoint(grown_into(tmp_path, source_of(), layout, name="once"))
    written = []

    def failing(file, folder, slices):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file.path)
        return write_file(file, folder, slices)

    monkeypatch.setattr("incr_ds.offline.run.write_file", failing)
    with pytest.raises(CheckpointError, match="nothing was published. Finished files are kept"):
        grow_checkpoint(grown_into(tmp_path, source_of(), layout))
    monkeypatch.setattr("incr_ds.offline.run.write_file", lambda *a: written.append(a[0].path) or write_file(*a))
    grow_checkpoint(grown_into(tmp_path, source_of(), layout, workers=3))
    assert set(written) == {file.path for file in grown_into(tmp_path, source_of(), layout).files}
    assert len(written) < 2 * len(set(written)), "files that were finished are not written again"
    one, other = contents(tmp_path / "once"), contents(tmp_path / "out")
    assert {name: data for name, data in one.items() if name != "manifest.json"} == {
        name: data for name, data in other.items() if name != "manifest.json"
    }


UNDER_LAYER_NORM = {
    "gpt_neox": ({"tie_word_embeddings": True}, "hidden_act", ("rotary_percent", 0.25)),
    "gpt2": (
        {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.0, "tie_word_embeddings": False},
        "activation_function",
        ("position_embedding_type", "learned_absolute"),
    ),
}


@pytest.mark.parametrize("family", UNDER_LAYER_NORM)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_arguments_and_config_of_models_under_layer_norm_follow_from_each_other(family, activation):
    changes, field, (name, value) = UNDER_LAYER_NORM[family]
    source = source_of(family, **changes, **{field: activation}).architecture
    arguments = arguments_of(source, "test")
    assert (arguments["bias_gelu_fusion"], arguments[name]) == (activation == "gelu_new", value)
    found = architecture_from_config(config_of(arguments, 104, Path("common.pt")), "test")
    assert found.config == source.config and found.sizes == source.sizes


def test_arguments_of_other_models_under_layer_norm_are_refused():
    arguments = arguments_of(source_of("gpt_neox").architecture, "test")
    refused = {
        "args.swiglu: found True, and a config follows from False only": {"swiglu": True},
        "args.bias_gelu_fusion: expected true or false, found None": {"bias_gelu_fusion": None},
        "6 heads of 16 with 3 query groups and a hidden size of 96": {
            "group_query_attention": True,
            "num_query_groups": 3,
        },
        "6 heads of 8 with 6 query groups": {"kv_channels": 8},
    }
    for message, changes in refused.items():
        with pytest.raises(CheckpointError, match=message):
            config_of({**arguments, **changes}, 104, Path("common.pt"))


REFUSED = {
    "tensor_parallel 4: does not divide": ({}, {"tensor_parallel": 4}),
    "self_attn.o_proj.bias: Megatron-core has biases of q, k and v alone": ({"attention_bias": True}, {}),
    "hidden_act: 'gelu', and --swiglu means 'silu'": ({"hidden_act": "gelu"}, {}),
    "rope_parameters: .*Megatron-core has llama3's scaling": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {},
    ),
    "rope_theta: 10000.5, and --rotary-base is a whole number": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}},
        {},
    ),
}


REFUSED_MIXTURES = {
    "num_experts_per_tok: 1, and Megatron-core weighs a single": ({"num_experts_per_tok": 1}, {}),
    "router_jitter_noise: 0.1, and Megatron-core has noise": ({"router_jitter_noise": 0.1}, {}),
    "expert_parallel 3: does not divide the 4 experts; it can be 1, 2, 4": ({}, {"expert_parallel": 3}),
    "tensor_parallel 4: does not divide": ({}, {"tensor_parallel": 4}),
}


@pytest.mark.parametrize("message", REFUSED_MIXTURES)
def test_a_mixture_that_megatron_core_does_not_have_is_refused(tmp_path: Path, message: str):
    changes, layout = REFUSED_MIXTURES[message]
    with pytest.raises(LayoutError, match=message):
        grown_into(tmp_path, source_of("mixtral", **changes), layout)


REFUSED_ARGUMENTS_OF_MIXTURES = {
    "args.moe_shared_expert_intermediate_size: found 64, and a config follows from None only": 64,
    "args.moe_router_pre_softmax: found True, and a config follows from False only": True,
    "args.moe_router_load_balancing_type: found 'sinkhorn', which weighs": "sinkhorn",
    "args.moe_layer_freq: found a list, and a config follows from 1 only": [0, 1, 1],
}


def test_arguments_of_mixtures_that_transformers_does_not_have_are_refused():
    arguments = arguments_of(source_of("qwen3_moe").architecture, "test")
    assert config_of({**arguments, "moe_layer_freq": [1, 1, 1]}, 104, Path("common.pt"))["num_local_experts"] == 4
    for message, value in REFUSED_ARGUMENTS_OF_MIXTURES.items():
        name = message.partition(":")[0].removeprefix("args.")
        with pytest.raises(CheckpointError, match=message):
            config_of({**arguments, name: value}, 104, Path("common.pt"))


def test_expert_parallelism_gives_the_experts_an_optimizer_of_their_own(tmp_path: Path):
    grow_checkpoint(grown_into(tmp_path, source_of("mixtral"), {"expert_parallel": 2}))
    common = common_of(tmp_path / "out")
    assert vars(common["args"])["expert_model_parallel_size"] == 2 and set(common["optimizer"]) == {0, 1}
    for number, optimizer in common["optimizer"].items():
        groups = optimizer["optimizer"]["param_groups"]
        found = [(group["is_expert_parallel"], group["wd_mult"]) for group in groups]
        assert found == ([(True, 1.0)] if number else [(False, 1.0), (False, 0.0)])
    written = open_source(tmp_path / "out")
    assert written.facts.step == 100
    same_values(written, source_of("mixtral"))
    with pytest.raises(LayoutError, match="expert_parallel 2: a llama has no experts"):
        grown_into(tmp_path, source_of(), {"expert_parallel": 2})
    with pytest.raises(ConfigError, match="expert_parallel with format: universal; it belongs to torch_dist"):
        grown_into(tmp_path, source_of("mixtral"), {"format": "universal", "expert_parallel": 2})


def test_flattened_moments_of_experts_are_read(tmp_path: Path):
    """fully_sharded_model_space, in which every expert of every layer is a part."""
    source = source_of("mixtral")
    grow_checkpoint(grown_into(tmp_path, source, {"dtype": "bfloat16"}))
    inner, prefixes = tmp_path / "out/iter_0000100", (PREFIX["exp_avg"], PREFIX["exp_avg_sq"])
    metadata = pickle.loads((inner / ".metadata").read_bytes())
    for key in [key for key in metadata.state_dict_metadata if key.endswith("pre_mlp_layernorm.weight")]:
        del metadata.state_dict_metadata[key]  # a run stores a norm under one key
        metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != key}
    (inner / ".metadata").write_bytes(pickle.dumps(metadata))
    flatten(inner, [key for key in stored_by_torch(inner) if key.startswith(prefixes)], 2, 2)
    same_values(open_source(inner), source)


REFUSED_UNDER_LAYER_NORM = {
    "use_parallel_residual: true, and Megatron-core's FFN reads": ("gpt_neox", {"use_parallel_residual": True}),
    "attention_bias: false, and with --disable-bias-linear the FFN": ("gpt_neox", {"attention_bias": False}),
    "hidden_act: 'relu', and Megatron-core has gelu_new and gelu": ("gpt_neox", {"hidden_act": "relu"}),
    "activation_function: 'relu', and Megatron-core has gelu_new": ("gpt2", {"activation_function": "relu"}),
    "scale_attn_weights: false, and Megatron-core divides": ("gpt2", {"scale_attn_weights": False}),
    "embd_pdrop: 0.3, and --hidden-dropout is that of resid_pdrop, too": ("gpt2", {"embd_pdrop": 0.3}),
}


@pytest.mark.parametrize("message", REFUSED_UNDER_LAYER_NORM)
def test_a_model_under_layer_norm_that_megatron_core_does_not_have_is_refused(tmp_path: Path, message: str):
    family, changes = REFUSED_UNDER_LAYER_NORM[message]
    with pytest.raises(LayoutError, match=message):
        grown_into(tmp_path, source_of(family, **changes))


@pytest.mark.parametrize("message", REFUSED)
def test_what_megatron_core_does_not_have_is_refused(tmp_path: Path, message: str):
    changes, layout = REFUSED[message]
    with pytest.raises(LayoutError, match=message):
        grown_into(tmp_path, source_of(**changes), layout)


def test_other_families_windows_and_modules_are_refused(tmp_path: Path):
    with pytest.raises(
        LayoutError, match="no modules for opt; supported: llama, mistral, qwen2, qwen3, gpt_neox, gpt2, mixtral"
    ):
        grown_into(tmp_path, SyntheticCheckpoint(small_architecture("opt")))
    window = SyntheticCheckpoint(small_architecture("mistral", sliding_window=9))
    with pytest.raises(LayoutError, match="sliding_window: 9; only full attention is written"):
        grown_into(tmp_path, window)
    with pytest.raises(ConfigError, match="modules: megatron-deepspeed with format: torch_dist"):
        grown_into(tmp_path, source_of(), {"modules": "megatron-deepspeed"})
    with pytest.raises(ConfigError, match="learning_rates with format: universal; it belongs to torch_dist and torch"):
        grown_into(tmp_path, source_of(), {"format": "universal", "learning_rates": [1e-3, 0.0]})
    export_huggingface(source_of(), tmp_path / "weights", torch.bfloat16, tmp_path / "none")
    with pytest.raises(GrowthError, match="optimizer: reset"):
        grown_into(tmp_path, open_source(tmp_path / "weights"))
