"""The declared tensors are transformers' own, and a config that is not understood is refused with the field."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from incr_ds.arch.architecture import architecture_from_config, read_config, saved_architecture
from incr_ds.arch.config_reads import changes_nothing, reads_of
from incr_ds.arch.family import families, family_of, mixtures
from incr_ds.errors import ConfigError
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import FAMILIES, TRAINED_BESIDE, pico_architecture, pico_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_transformers(family: str, tied: bool):
    architecture = pico_architecture(family, tied=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**pico_config(family, tied=tied)))
    found = [(spec.name, spec.shape) for spec in architecture.stored]
    assert found == [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert architecture.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert architecture.by_name["lm_head.weight"].tied_to == ("model.embed_tokens.weight" if tied else None)


def test_every_trained_family_is_tested():
    assert {name for name, family in families().items() if family.training_supported} == {*FAMILIES, *TRAINED_BESIDE}


# Switches that are off as a config is filled: on, so that what depends on them shows within ten tokens.
ON = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize("on", [False, True], ids=["as filled", "switched on"])
@pytest.mark.parametrize("name", sorted(families() | mixtures()))
def test_no_config_field_of_transformers_is_ignored(name, on):
    """The family file declares every field of the config class, and fields declared to have no effect have none."""
    family = (families() | mixtures())[name]
    assert family.model_type == name
    assert set(AutoConfig.for_model(name).to_dict()) <= family.known_fields
    config = probed_config(name, on)
    tokens = torch.arange(20).reshape(2, 10)
    before = logits_of(config, tokens)
    for field in set(family.config.without_effect) & set(config):
        changed = logits_of({**config, field: other_than(config[field])}, tokens)
        assert torch.equal(before, changed), field


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("llama", "attention_dropout"),
        ("qwen3", "use_sliding_window"),
        ("qwen2", "max_window_layers"),
        ("gemma2", "final_logit_softcapping"),
        ("gpt_neox", "use_parallel_residual"),
        ("gpt2", "resid_pdrop"),
    ],
)
def test_a_field_that_changes_the_mathematics_shows(name, field):
    """The test above would notice if it were declared to have no effect."""
    config, tokens = probed_config(name, on=True), torch.arange(20).reshape(2, 10)
    changed = logits_of({**config, field: other_than(config[field])}, tokens)
    assert not torch.equal(logits_of(config, tokens), changed)


def probed_config(name, on):
    family = (families() | mixtures())[name]
    switched = family.known_fields - set(family.config.only) if on else ()
    return small_architecture(name, **{field: value for field, value in ON.items() if field in switched}).config


def logits_of(config, tokens):
    """In evaluation, and with dropout as in training."""
    given = {field: value for field, value in config.items() if field != "layer_types"}  # follow from the others
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given), experts_implementation="eager")
    with torch.no_grad():
        return torch.stack([model.train(mode)(tokens).logits for mode in (False, True)])


def other_than(value):
    others = {bool: lambda: not value, float: lambda: value + 0.3, int: lambda: value + 1, str: lambda: "mean"}
    return others.get(type(value), lambda: "tanh")()


@pytest.mark.parametrize("family", sorted(families()))
def test_shapes_and_order_of_every_family(family: str):
    architecture = small_architecture(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture.config))
    found = [(spec.name, spec.shape) for spec in architecture.stored]
    assert found == [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("name", sorted(mixtures()))
def test_tensors_of_mixtures_are_those_of_the_files(name, tmp_path: Path):
    """transformers joins experts in memory and saves them one by one."""
    architecture = small_architecture(name)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture.config)).save_pretrained(tmp_path)
    found = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert found == {spec.saved_name: spec.shape for spec in architecture.stored}
    assert family_of(name, "test").class_name == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]


@pytest.mark.parametrize("name", sorted(families() | mixtures()))
def test_a_complete_config_is_taken_as_it_is(name, tmp_path: Path):
    """What transformers saves gives the architecture that transformers fills in, without asking it again."""
    asked = small_architecture(name)
    config = AutoConfig.for_model(**asked.config)
    config.save_pretrained(tmp_path)
    saved = saved_architecture(tmp_path / "config.json")
    assert saved.sizes == asked.sizes and saved.tensors == asked.tensors and saved.tied == asked.tied
    effective = asked.family.effective_fields
    assert {key: saved.config.get(key) for key in effective} == {key: asked.config.get(key) for key in effective}
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] == asked.family.class_name


@pytest.mark.parametrize("value", ["wide", 0, True, 24.0])
def test_sizes_of_a_complete_config(tmp_path: Path, value):
    config = {**pico_architecture().config, "hidden_size": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=rf"config.json: hidden_size: expected a positive whole number, found {value!r}"
    ):
        saved_architecture(tmp_path / "config.json")


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 10**7), ("vocab_size", 10**18)])
def test_sizes_that_no_model_has(tmp_path: Path, field, value):
    """A config with ten million layers is refused before its tensors are listed, which would fill the memory."""
    (tmp_path / "config.json").write_text(json.dumps({**pico_architecture().config, field: value}))
    with pytest.raises(ConfigError, match=rf"config.json: {field}: {value} is above \d+, more than any model has"):
        saved_architecture(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": "x"}, "rms_norm_eps: expected a positive number, found 'x'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: expected a positive number, found -1"),
        ({"rope_parameters": 5}, "rope_parameters: expected a mapping, found 5"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta: expected a positive number, found 0"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported; supported: "),
    ],
)
def test_numbers_that_growth_computes_with(tmp_path: Path, change, said):
    (tmp_path / "config.json").write_text(json.dumps({**pico_architecture().config, **change}))
    with pytest.raises(ConfigError, match=f"config.json: {said}"):
        saved_architecture(tmp_path / "config.json")


def test_reading_a_checkpoint_and_laying_it_out_anew_starts_no_transformers(tmp_path: Path):
    """Importing transformers takes longer than growing many checkpoints."""
    config = dict(pico_architecture().config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = (
        "import sys; from pathlib import Path; import incr_ds.offline.run, incr_ds.offline.compare, incr_ds.cli.tables\n"
        "from incr_ds.arch.architecture import saved_architecture\n"
        "from incr_ds.config.growth import GrowthRecipe; from incr_ds.growth.planner import plan_growth\n"
        "plan = plan_growth(saved_architecture(Path(sys.argv[1])), GrowthRecipe(target={}))\n"
        "assert plan.function_preserving and not {'transformers', 'deepspeed', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "config.json")], check=True)


def test_head_size_follows_where_the_config_has_none():
    assert pico_architecture("qwen2").sizes["head_dim"] == 8  # 48 / 6
    assert pico_architecture("llama").sizes["head_dim"] == 8  # its own, not 24 / 6


def test_biases_follow_the_config():
    names = set(pico_architecture("llama", attention_bias=True).by_name) - set(pico_architecture("llama").by_name)
    assert {name.split(".", 3)[3] for name in names} == {f"self_attn.{x}_proj.bias" for x in "qkvo"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt_fancy"},
            r"model_type 'gpt_fancy' is not supported; supported: cohere, gemma2, .*llama, ministral3, mistral",
        ),
        (
            {"attention_chunk_size": 64, "is_causal": False, "logit_softcapping": 30.0},
            r"test: attention_chunk_size \(64\), is_causal \(false\): transformers 5\S+ reads this for a llama "
            r"\(cache_utils.py, .*\), .* nothing was done.*without it with --config FILE; "
            r"otherwise declare it in .*families/llama.yaml",
        ),
        ({"rope_interleaved": True}, r"rope_interleaved is True; llama is supported with False only"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config \(fp8\): the weights are quantized, .* Use the unquantized release .*dequantize\(\)",
        ),
        ({"pretraining_tp": 2}, r"pretraining_tp is 2; llama is supported with 1 only"),
        (
            {"num_attention_heads": 8},
            r"num_attention_heads 8 is not a multiple of num_key_value_heads 3; with 3 kv heads, "
            r"num_attention_heads can be 6 or 9; with 8 query heads, "
            r"num_key_value_heads can be 1, 2, 4, 8",
        ),
        ({"hidden_size": None}, r"test: hidden_size: missing; a llama config must state it|transformers refuses"),
        ({"hidden_size": "wide"}, r"transformers refuses this llama config: .*hidden_size"),
    ],
)
def test_refused_configs(change, message: str):
    with pytest.raises(ConfigError, match=message):
        architecture_from_config({**pico_config(), **change}, "test")


# AutoModelForCausalLM reads the one, and takes transformers' own class; the other's name is put together (output_ + what).
READ_OUTSIDE = {"auto_map", "output_cross_attentions"}


@pytest.mark.parametrize("name", sorted(families() | mixtures()))
def test_what_a_model_reads_of_its_config_is_found_in_its_source(name, monkeypatch: pytest.MonkeyPatch):
    """Every attribute that transformers asks a config for, from building a model to its loss, is one that the search finds."""
    config = AutoConfig.for_model(**small_architecture(name).config)
    asked = set()
    original = PretrainedConfig.__getattribute__

    def recording(self, attribute):
        asked.add(attribute)
        return original(self, attribute)

    monkeypatch.setattr(PretrainedConfig, "__getattribute__", recording)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    tokens = torch.arange(20).reshape(2, 10)
    for mode in (True, False):
        model.train(mode)(tokens, labels=tokens).loss.item()
    monkeypatch.undo()
    fields = {field for field in asked if not field.startswith("__") and not hasattr(PretrainedConfig, field)}
    fields |= set(vars(config)) & asked
    module = (families() | mixtures())[name].module
    assert {"vocab_size", "tie_word_embeddings", "per_layer_config"} <= asked
    assert not [field for field in fields - READ_OUTSIDE if not reads_of(field, module)]


@pytest.mark.parametrize(
    ("family", "field", "value", "harmless"),
    [
        ("llama", "unk_token_id", 0, True),
        ("gemma2", "hidden_act", "gelu_pytorch_tanh", True),
        ("llama", "hidden_act", "silu", False),  # declared
        ("gpt2", "hidden_size", 48, False),  # another name of n_embd
        ("llama", "sliding_window", None, True),
        ("llama", "sliding_window", 64, False),
        ("llama", "is_causal", False, False),
        ("llama", "is_causal", None, False),  # null is not what a model without it has
        ("llama", "per_layer_config", {"0": {"intermediate_size": 60}}, False),
    ],
)
def test_a_field_that_nothing_reads_changes_nothing(family: str, field, value, harmless):
    assert changes_nothing(field, value, family) == harmless


def test_files_that_are_no_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read .* name one with --config FILE"):
        read_config(tmp_path / "config.json")
    for text, message in (("{", "not valid JSON"), ("[1]", "expected a JSON object, found list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(pico_config()))
    assert read_config(tmp_path / "config.json") == pico_config()
