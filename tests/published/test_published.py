"""Configs of popular releases: inspected, planned, grown, and loaded by AutoModelForCausalLM with the same logits.

configs.yaml says which equal a copy of the published config.json, and which only have its documented values.
"""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import incr_ds
from incr_ds.arch.architecture import architecture_from_config
from incr_ds.arch.family import families, mixtures
from incr_ds.cli import inspect_checkpoint

COMPARED, RELEASES = yaml.safe_load_all(Path(__file__).with_name("configs.yaml").read_text())
# A default run takes the releases with the most unusual fields of each family, `make test-slow` all.
SAMPLE = {
    "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.2-1B", "JackFram/llama-68m", "mistralai/Mistral-Nemo-Base-2407",
    "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B", "openai-community/gpt2", "uer/gpt2-chinese-cluecorpussmall",
    "EleutherAI/gpt-neox-20b", "facebook/opt-125m", "microsoft/Phi-3-mini-128k-instruct",
    "allenai/OLMo-2-0325-32B", "google/gemma-2-27b-it",
    "google/gemma-3-1b-it", "HuggingFaceTB/SmolLM3-3B-Base", "allenai/Olmo-3.1-32B-Instruct", "ibm-granite/granite-3.1-2b-base",
    "stabilityai/stablelm-2-zephyr-1_6b", "bigcode/starcoder2-3b", "CohereForAI/c4ai-command-r-v01",
    "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B",
    "ministral3 text_config of mistralai/Ministral-3-3B-Instruct-2512", "microsoft/Phi-4-mini-instruct",
}  # fmt: skip
SIZES = {"vocab": 101, "hidden": 48, "layers": 3, "heads": 6, "ffn": 100, "positions": 64, "experts": 4}
LENGTH = 64
EAGER = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
SHORT, LONG = 8, LENGTH  # windows that are shorter than the context, and ones that are not


def shrunk(config):
    """A release's config with small sizes, and whatever has to fit them; everything else as configs.yaml has it."""
    axes = (families() | mixtures())[config["model_type"]].axes
    small = dict(config)
    for axis, field in axes.items():
        if config.get(field) is not None and axis in SIZES:
            small[field] = SIZES[axis]
    heads, kv_heads = config.get(axes["heads"]), config.get("num_key_value_heads")
    if kv_heads is not None:
        small["num_key_value_heads"] = 6 if kv_heads == heads else 1 if kv_heads == 1 else 3
    if config.get("head_dim") is not None:
        small["head_dim"] = 8 if config["head_dim"] * heads == config[axes["hidden"]] else 16
    longest = config.get("max_position_embeddings", LENGTH)
    for field in ("max_position_embeddings", "n_ctx", "original_max_position_embeddings"):
        if config.get(field) is not None:
            small[field] = LENGTH if config[field] == longest or field == "n_ctx" else LENGTH // 2
    if config.get("sliding_window") is not None:
        small["sliding_window"] = SHORT if config["sliding_window"] < longest else LONG
    for field in ("rope_scaling", "rope_parameters"):
        if "original_max_position_embeddings" in (config.get(field) or {}):
            small[field] = {**config[field], "original_max_position_embeddings": LENGTH // 2}
    if "layer_types" in config:
        small["layer_types"] = config["layer_types"][-SIZES["layers"] :]
    if "num_experts" in config:
        small |= {"num_experts": SIZES["experts"], "num_experts_per_tok": 2}
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(config.get(field), int):
            small[field] = min(config[field], 3)
    return small | {field: SIZES["hidden"] for field in ("word_embed_proj_dim",) if field in config}


def publish(folder, config):
    """Weights drawn for a config, and the config beside them, which transformers did not touch."""
    given = {name: value for name, value in config.items() if name not in ("auto_map", "architectures")}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**given), dtype=torch.float32, experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    if config["model_type"] == "gpt2":  # the Hub's own names, and the buffers beside them
        tensors = load_file(folder / "model.safetensors")
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, LENGTH, LENGTH) for layer in range(SIZES["layers"])}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def target_of(architecture):
    """Every axis larger, as every family allows it."""
    sizes, axes = architecture.sizes, architecture.family.axes
    grown = {axis: 2 * sizes[axis] for axis in ("hidden", "heads", "kv_heads") if axis in axes}
    target = {axes[axis]: size for axis, size in (grown | {"ffn": 250, "layers": 4}).items()}
    return target | ({axes["experts"]: 8, "num_experts_per_tok": 4} if "experts" in axes else {})


@pytest.mark.parametrize(
    "release", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in RELEASES]
)
def test_a_release_is_inspected_grown_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str], release):
    config = shrunk(RELEASES[release])
    source = tmp_path / "source"
    publish(source, config)
    inspect_checkpoint._inspect(source, None, None, False, True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["family"] == config["model_type"] and shown["sizes"]["hidden"] == SIZES["hidden"]
    target = target_of(architecture_from_config(config, release))
    recipe = {
        "target": target,
        "width": {"heads": {"new": "copy"}},
        "optimizer": "reset",
        "function_preserving": "required",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "layout": {"format": "huggingface"}}))
    request = incr_ds.GrowthRequest(source, tmp_path / "recipe.yaml", tmp_path / "grown")
    planned = incr_ds.plan_request(request)
    assert set(shown["notes"]) <= set(planned.notes)
    incr_ds.grow_checkpoint(planned)
    written = json.loads((request.output / "config.json").read_text())
    respelt = {"rope_parameters", "rope_theta", "rope_scaling"} if "num_experts" in config else set()
    grown = {*target, *respelt, "layer_types", "no_rope_layers", "num_experts", "word_embed_proj_dim"} & set(
        config
    )  # the latter follow from the sizes
    changed = {*grown, "torch_dtype", "dtype", "_name_or_path"}
    kept = {name: value for name, value in config.items() if name not in changed}
    assert {name: written.get(name) for name in kept} == kept
    assert (
        written["torch_dtype" if "torch_dtype" in config else "dtype"] == "float32"
    )  # what was written, as it was spelt
    # Layers of several kinds no longer alternate as transformers would fill in.
    more = {"layer_types"} if len(set(planned.plan.target.config.get("layer_types") or ())) > 1 else set()
    assert set(written) - set(config) <= {"dtype", *target, *respelt, *more}
    tokens = torch.randint(4, SIZES["vocab"], (2, 3 * SHORT), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, **EAGER).eval()(tokens).logits
            for path in (source, request.output)
        )
    assert float((before - after).abs().max() / before.abs().max()) <= 1e-5


def test_the_list_covers_every_family():
    assert len(COMPARED["published"]) >= 40
    assert sorted(name for names in COMPARED.values() for name in names) == sorted(RELEASES)
    assert {config["model_type"] for config in RELEASES.values()} == set(families() | mixtures())
    assert {RELEASES[name]["model_type"] for name in SAMPLE} == set(families() | mixtures())
