"""Growth into Megatron-LM's format torch: the files of each rank, by the definition of the format, and what the reader finds."""

from argparse import Namespace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from gpt2_parameters import rank_parameters
from megatron_growth import planned
from megatron_rank_folders import parameters_of
from truths import same_values, truth

from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint

LAYOUT = {"format": "torch", "vocabulary_multiple": 8}
GROUPED = {"num_key_value_heads": 2, "num_hidden_layers": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
OWN = {
    "mistral": GROUPED | {"sliding_window": None},
    "gpt_neox": {"use_parallel_residual": False, "rope_parameters": ROPE, "num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "opt": {},
    "qwen3_moe": GROUPED | {"num_experts_per_tok": 3},
}


def source_of(family="llama", **changes):
    return truth(family, **{**OWN.get(family, GROUPED), **changes})


def grown_into(folder, source, layout=None, **further):
    """The plan of a growth into the format of this module."""
    return planned(folder, source, LAYOUT | (layout or {}), **further)


LAYOUTS = {
    "bf16": {"dtype": "bfloat16", "pipeline_parallel": 2},
    "fp32, local": {"dtype": "float32", "tensor_parallel": 2, "transformer_impl": "local"},
    "distributed": {
        "dtype": "bfloat16",
        "tensor_parallel": 2,
        "pipeline_parallel": 4,
        "distributed_optimizer": True,
    },
}


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"]
# By default each family in one layout.
ROUND_TRIPS = [
    pytest.param(family, layout, marks=[] if number % len(LAYOUTS) == place else pytest.mark.slow)
    for number, family in enumerate(FAMILIES)
    for place, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("family", "name"), ROUND_TRIPS)
def test_the_reader_reads_back_what_was_written(tmp_path: Path, family, name):
    layout, source = LAYOUTS[name], source_of(family, tie_word_embeddings=family in ("qwen3", "gpt2"))
    grow_checkpoint(grown_into(tmp_path, source, layout))
    found = open_source(tmp_path / "out")
    assert (found.facts.kind, found.facts.path) == ("Megatron-LM torch", tmp_path / "out/iter_0000100")
    assert (found.facts.step, found.facts.recorded.global_steps) == (100, 100)
    assert found.facts.dtype == layout["dtype"]
    degrees = {key: layout.get(key, 1) for key in ("tensor_parallel", "pipeline_parallel")}
    assert found.facts.layout == degrees
    same_values(found, source)
    assert set(found.self_check()) == {spec.name for spec in source.architecture.stored}
    (tmp_path / "out/config.json").unlink()
    again = open_source(tmp_path / "out")
    assert again.architecture.sizes == source.architecture.sizes and again.architecture.tied == source.architecture.tied


def loaded(path):
    """A file's content, as a loader that runs no code reads it."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def contents_by_rank(folder, degrees, name="model_optim_rng.pt"):
    suffixes = {stage: f"_{stage:03d}" if degrees[1] > 1 else "" for stage in range(degrees[1])}
    return {
        (rank, stage): loaded(folder / f"mp_rank_{rank:02d}{suffixes[stage]}" / name)
        for rank, stage in product(range(degrees[0]), range(degrees[1]))
    }


def local(name):
    return name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")


def of_transformer_engine(name):
    return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def llama_parameters(source, state, degrees, rank, stage, rename):
    """Those of a rank by the definition of the format, with zeros as padding."""
    held = parameters_of(source, state, degrees, rank, stage)
    return {rename(name): torch.where(tensor == 9.0, 0.0, tensor) for name, tensor in held.items()}


def gpt2_parameters(source, state, degrees, rank, stage, rename):
    return rank_parameters(source, state, degrees, rank, stage)


IMPLEMENTATIONS = {"local": local, "transformer_engine": of_transformer_engine}
# Decaying parameters, in the order of a layer's modules. The others follow from the names.
MATRICES = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]


@pytest.mark.parametrize(("family", "implementation"), [*product(["llama"], IMPLEMENTATIONS), ("gpt2", "local")])
def test_each_rank_has_its_parameters_and_their_states(tmp_path: Path, family, implementation):
    degrees, source = (2, 2), source_of(family, tie_word_embeddings=True, vocab_size=112 if family == "gpt2" else 101)
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "dtype": "bfloat16", "transformer_impl": implementation}
    grow_checkpoint(grown_into(tmp_path, source, layout))
    expected_of = {"llama": llama_parameters, "gpt2": gpt2_parameters}[family]
    for (rank, stage), content in contents_by_rank(tmp_path / "out/iter_0000100", degrees).items():
        expected = {
            state: expected_of(source, state, degrees, rank, stage, IMPLEMENTATIONS[implementation]) for state in STATES
        }
        weights = {key: value for key, value in content["model"].items() if not key.endswith("_extra_state")}
        assert set(weights) == set(expected["weight"])
        inner, masters = content["optimizer"]["optimizer"], content["optimizer"]["fp32_from_fp16_params"]
        names = [[name for name in weights if (weights[name].dim() > 1) == matrix] for matrix in (True, False)]
        assert [group["wd_mult"] for group in inner["param_groups"]] == [1.0, 0.0]
        assert [number for group in inner["param_groups"] for number in group["params"]] == list(range(len(weights)))
        assert [len(group["params"]) for group in inner["param_groups"]] == [len(group) for group in names]
        found = dict(zip(names[0] + names[1], masters[0] + masters[1], strict=True))
        for number, name in enumerate(names[0] + names[1]):
            assert torch.equal(weights[name], expected["weight"][name].bfloat16()), name
            assert torch.equal(found[name], expected["weight"][name]), name
            # torch's step among them would stop the loader of Transformer Engine's optimizer.
            assert set(inner["state"][number]) == {"exp_avg", "exp_avg_sq"}
            for state in STATES[1:]:
                assert torch.equal(inner["state"][number][state], expected[state][name]), (name, state)
        own = [
            name.removeprefix("decoder.layers.1.").removesuffix(".weight") for name in names[0] if "layers.1." in name
        ]
        assert own == MATRICES


@pytest.mark.parametrize("distributed", [True, False])
def test_the_groups_of_the_distributed_optimizer_begin_with_a_rank_s_first_parameter(tmp_path: Path, distributed):
    """Megatron-core 0.13 and before take them by their places; on later stages of local modules a norm is the first."""
    layout = {
        "pipeline_parallel": 2,
        "dtype": "bfloat16",
        "transformer_impl": "local",
        "distributed_optimizer": distributed,
    }
    grow_checkpoint(grown_into(tmp_path, source_of(), layout))
    contents = contents_by_rank(tmp_path / "out/iter_0000100", (1, 2))
    found = [
        [group["wd_mult"] for group in contents[0, stage]["optimizer"]["optimizer"]["param_groups"]] for stage in (0, 1)
    ]
    assert found == [[1.0, 0.0], [0.0, 1.0] if distributed else [1.0, 0.0]]


def test_transformer_engine_s_modules_register_in_another_order(tmp_path: Path):
    """A norm is the first parameter of the linear layer that reads it, behind the projection of the attention's output."""
    grow_checkpoint(grown_into(tmp_path, source_of("gpt2"), {"pipeline_parallel": 4}))
    content = loaded(tmp_path / "out/iter_0000100/mp_rank_00_001/model_optim_rng.pt")
    inside = [name.removeprefix("decoder.layers.0.") for name in content["model"]]
    assert [name for name in inside if not name.endswith("_extra_state")] == [
        "self_attention.linear_proj.weight",
        "self_attention.linear_proj.bias",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.layer_norm_bias",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.layer_norm_bias",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc1.bias",
        "mlp.linear_fc2.weight",
        "mlp.linear_fc2.bias",
    ]
    assert {name for name in inside if name.endswith("_extra_state")} == {
        "self_attention.core_attention._extra_state",
        *(f"{module}._extra_state" for module in MATRICES),
    }
    last = loaded(tmp_path / "out/iter_0000100/mp_rank_00_003/model_optim_rng.pt")["model"]
    assert {"decoder.final_layernorm._extra_state", "output_layer._extra_state", "output_layer.weight"} < set(last)
    assert not any(value is not None for name, value in last.items() if name.endswith("_extra_state"))


def test_experts_come_one_after_the_other(tmp_path: Path):
    grow_checkpoint(grown_into(tmp_path, source_of("qwen3_moe"), {"pipeline_parallel": 4}))
    content = loaded(tmp_path / "out/iter_0000100/mp_rank_00_001/model_optim_rng.pt")["model"]
    inside = [name.removeprefix("decoder.layers.0.") for name in content if not name.endswith("_extra_state")]
    experts = [f"mlp.experts.local_experts.{e}.linear_fc{n}.weight" for e in range(4) for n in (1, 2)]
    assert inside[-10:] == ["pre_mlp_layernorm.weight", "mlp.router.weight", *experts]


def test_the_distributed_optimizer_has_one_buffer(tmp_path: Path):
    """The last parameter first. A copy of the embedding, whose gradients two stages add up, has a bucket of its own."""
    source = source_of("llama", tie_word_embeddings=True, hidden_size=24, intermediate_size=20, num_attention_heads=4)
    layout = {"pipeline_parallel": 2, "distributed_optimizer": True, "vocabulary_multiple": 1, "dtype": "bfloat16"}
    grow_checkpoint(grown_into(tmp_path, source, layout | {"transformer_impl": "local"}))
    folder = tmp_path / "out/iter_0000100"
    models = contents_by_rank(folder, (1, 2))
    for (rank, stage), content in contents_by_rank(folder, (1, 2), "distrib_optim.pt").items():
        held = {state: llama_parameters(source, state, (1, 2), rank, stage, local) for state in STATES}
        [(dtypes, buffer)] = content[0].items()
        assert content["buckets_coalesced"] and dtypes == (torch.bfloat16, torch.float32)
        names = [name for name in models[rank, stage]["model"] if not name.endswith("_extra_state")]
        assert "optimizer" in models[rank, stage] and "state" not in models[rank, stage]["optimizer"]["optimizer"]
        for state, key in zip(STATES, ("param", "exp_avg", "exp_avg_sq"), strict=True):
            expected, within = [], 0
            for name in reversed(names):
                tensor = (
                    held[state][name][:101]
                    if "word_embeddings" in name or "output_layer" in name
                    else held[state][name]
                )
                expected += [torch.zeros(-within % 64), tensor.reshape(-1)]
                within = 0 if "output_layer" in name else within + -within % 64 + tensor.numel()
            assert torch.equal(buffer[key], torch.cat(expected)), (stage, state)
            assert buffer["numel_unpadded"] == buffer[key].numel()


def test_a_file_states_the_run_in_plain_values(tmp_path: Path):
    layout = {"tensor_parallel": 2, "dtype": "float32", "learning_rates": [3e-4, 3e-5]}
    grow_checkpoint(grown_into(tmp_path, source_of("qwen3"), layout))
    for content in contents_by_rank(tmp_path / "out/iter_0000100", (2, 1)).values():
        assert (content["iteration"], content["checkpoint_version"]) == (100, 3.0)
        assert "rng_state" not in content and content["opt_param_scheduler"]["lr_decay_style"] == "constant"
        for group in content["optimizer"]["param_groups"]:
            assert (group["step"], group["max_lr"], group["min_lr"], group["is_expert_parallel"]) == (
                100,
                3e-4,
                3e-5,
                False,
            )
        args = vars(content["args"])
        assert (args["num_query_groups"], args["kv_channels"], args["padded_vocab_size"]) == (2, 8, 112)
        assert (args["ckpt_format"], args["transformer_impl"], args["use_distributed_optimizer"]) == (
            "torch",
            "transformer_engine",
            False,
        )
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "100"


@pytest.mark.parametrize("distributed", [False, True])
def test_without_moments_a_release_holds_the_weights_alone(tmp_path: Path, distributed):
    source, layout = source_of(), {"dtype": "bfloat16", "distributed_optimizer": distributed}
    grow_checkpoint(grown_into(tmp_path, source, layout, optimizer="reset"))
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    assert [path.name for path in (tmp_path / "out/release").rglob("*.pt")] == ["model_optim_rng.pt"]
    found = open_source(tmp_path / "out")
    assert found.facts.path.name == "release" and found.facts.states == ("weight",)
    assert found.facts.no_moments == "it was saved without the optimizer"
    same_values(found, source, ("weight",), torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "mixtral"])
def test_a_hugging_face_folder_comes_back_bit_for_bit(tmp_path: Path, family: str):
    export_huggingface(source_of(family), tmp_path / "first", torch.bfloat16, tmp_path / "none")
    layout = LAYOUT | {
        "dtype": "bfloat16",
        "tensor_parallel": 2,
        "pipeline_parallel": source_of(family).architecture.num_layers,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"target": {}, "optimizer": "reset", "layout": layout}))
    grow_checkpoint(plan_request(GrowthRequest(tmp_path / "first", tmp_path / "recipe.yaml", tmp_path / "out")))
    export_huggingface(open_source(tmp_path / "out"), tmp_path / "second", torch.bfloat16, tmp_path / "out")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_a_grown_checkpoint_has_the_same_tensors_as_in_another_format(tmp_path: Path):
    grown = {"target": {"num_hidden_layers": 6, "intermediate_size": 300}}
    grow_checkpoint(grown_into(tmp_path, source_of(), {"tensor_parallel": 2, "pipeline_parallel": 3}, **grown))
    grow_checkpoint(grown_into(tmp_path, source_of(), {"format": "universal"}, name="universal", **grown))
    same_values(open_source(tmp_path / "out"), open_source(tmp_path / "universal"))


REFUSED = {
    "tensor_parallel 4: does not divide num_key_value_heads 2": ("llama", {"tensor_parallel": 4}),
    "pipeline_parallel 3: does not divide num_hidden_layers 4, and Megatron cuts evenly only; pipeline_parallel can be "
    "1, 2, 4": ("llama", {"pipeline_parallel": 3}),
    "no modules for opt; supported: llama, mistral": ("opt", {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_megatron_cannot_cut_or_does_not_have_is_refused(tmp_path: Path, message: str):
    family, layout = REFUSED[message]
    with pytest.raises(LayoutError, match=message):
        grown_into(tmp_path, source_of(family), layout)


WRONG = {
    r"stages \[3, 1\]: format: torch spreads its layers evenly; remove stages": {
        "pipeline_parallel": 2,
        "stages": [3, 1],
    },
    "expert_parallel with format: torch; it belongs to torch_dist; leave it out": {"expert_parallel": 2},
    "modules: megatron-deepspeed with format: torch and": {"modules": "megatron-deepspeed"},
    "transformer_impl with format: torch_dist; it belongs to torch;": {
        "format": "torch_dist",
        "transformer_impl": "local",
    },
    "distributed_optimizer with format: deepspeed; it belongs": {"format": "deepspeed", "distributed_optimizer": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_keys_of_another_format_are_refused(tmp_path: Path, message: str):
    with pytest.raises(ConfigError, match=message):
        grown_into(tmp_path, source_of(), WRONG[message])
