"""The plain model is transformers' model: same names, same loss, same gradients."""

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from incr_ds.arch.training import check_vocabularies
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.losses.distillation import distillation_loss
from incr_ds.model.build import check_parameters
from incr_ds.model.layers import LayerFactory
from incr_ds.model.plain import LanguageModel
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import CheckpointWeights, FreshWeights
from incr_ds.sharding.placement import rank_parameters
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import FAMILIES, pico_architecture

ONE_RANK = TensorRanks(None, 0, 1)


def plain(checkpoint, dtype=torch.float64, attention="sdpa", recompute=False, softcap=None):
    loss = partial(distillation_loss, softcap=softcap)
    factory = LayerFactory(
        checkpoint.architecture,
        ONE_RANK,
        CheckpointWeights(checkpoint),
        dtype,
        torch.device("cpu"),
        attention,
        recompute,
        loss,
    )
    return LanguageModel(factory, range(checkpoint.architecture.num_layers + 3))


def transformers_model(checkpoint, dtype=torch.float64):
    config = dict(checkpoint.architecture.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config), dtype=dtype)
    state = {name: checkpoint.read(name).to(dtype) for name in (spec.name for spec in checkpoint.architecture.stored)}
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    return model


def batch():
    ids = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
# With Mistral's sliding window of 5, shorter than the sequence, the masks matter.
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_equal_transformers(family: str, tied: bool, attention):
    checkpoint = drawn_checkpoint(pico_architecture(family, tied=tied))
    ours, theirs = plain(checkpoint, attention=attention), transformers_model(checkpoint)
    input_ids, labels = batch()
    loss = ours(input_ids, labels).loss
    expected = torch.nn.functional.cross_entropy(theirs(input_ids).logits.flatten(0, 1), labels.flatten())
    # transformers rounds inside its norms to fp32, so different attention kernels differ by that much.
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if attention == "sdpa" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, expected, **tolerance)
    loss.backward(), expected.backward()
    mine, found = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(found)
    for name, parameter in mine.items():
        torch.testing.assert_close(
            parameter.grad, found[name].grad, msg=lambda text, n=name: f"{n}: {text}", **tolerance
        )


def test_a_layer_may_alternate_between_window_and_full_attention():
    types = ["full_attention", "sliding_attention", "full_attention"]
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": types}
    checkpoint = drawn_checkpoint(pico_architecture("qwen3", **changes))
    input_ids, labels = batch()
    expected = torch.nn.functional.cross_entropy(
        transformers_model(checkpoint)(input_ids).logits.flatten(0, 1), labels.flatten()
    )
    torch.testing.assert_close(plain(checkpoint)(input_ids, labels).loss, expected, rtol=1e-9, atol=0)
    full = drawn_checkpoint(pico_architecture("qwen3"))
    assert (plain(full)(input_ids, labels).loss - expected).abs() > 1e-4, "the window must have an effect"


def test_recomputed_activations_give_the_same_gradients():
    checkpoint = drawn_checkpoint(pico_architecture("qwen3"))
    gradients = []
    for recompute in (False, True):
        model = plain(checkpoint, recompute=recompute)
        model(*batch()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_inverse_frequencies_stay_fp32_in_a_bf16_model():
    checkpoint = drawn_checkpoint(pico_architecture(max_position_embeddings=4096))
    model = plain(checkpoint, torch.bfloat16).to(torch.bfloat16)
    hidden = torch.zeros(1, 3000, 24, dtype=torch.bfloat16)
    cos, sin = model._positions.arguments(hidden, 0)["position_embeddings"]
    exact = torch.arange(3000)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(cos[0, :, :4], exact.cos().bfloat16(), rtol=0, atol=1e-2)
    assert cos.dtype == torch.bfloat16


class TestFreshWeights:
    def shards(self, tensor_parallel=1, rank=0):
        layout = ParallelLayout(tensor_parallel=tensor_parallel)
        architecture = pico_architecture(tied=False, num_key_value_heads=2, pad_token_id=7)
        return architecture, rank_parameters(architecture, layout, 0, rank)

    def test_follow_transformers_initialization(self):
        architecture, shards = self.shards()
        values = {shard.tensor.name: FreshWeights(architecture, seed=0).read(shard) for shard in shards}
        assert all((values[name] == 1).all() for name in values if "norm" in name)
        assert not values["model.embed_tokens.weight"][7].any(), (
            "the padding token's row is zero, as transformers has it"
        )
        matrix = torch.cat([value.flatten() for name, value in values.items() if "proj" in name])
        assert abs(matrix.std() - 0.2) < 0.002 and abs(matrix.mean()) < 0.005

    def test_biases_start_at_zero(self):
        architecture = pico_architecture("qwen2")
        for shard in rank_parameters(architecture, ParallelLayout(), 0, 0):
            if shard.tensor.name.endswith("bias"):
                assert not FreshWeights(architecture, 0).read(shard).any()

    def test_are_the_same_model_for_every_layout(self):
        architecture, whole = self.shards()
        source = FreshWeights(architecture, seed=3)
        expected = {shard.tensor.name: source.read(shard) for shard in whole}
        for rank in range(2):
            for shard in self.shards(2, rank)[1]:
                bounds = tuple(slice(*bound) for bound in shard.bounds)
                assert torch.equal(FreshWeights(architecture, 3).read(shard), expected[shard.tensor.name][bounds])

    def test_depend_on_seed_and_name(self):
        architecture, shards = self.shards()
        q, other = (next(s for s in shards if f"layers.{layer}.self_attn.q_proj" in s.parameter) for layer in (0, 1))
        values = FreshWeights(architecture, 0).read(q)
        assert not torch.equal(values, FreshWeights(architecture, 1).read(q))
        assert not torch.equal(values, FreshWeights(architecture, 0).read(other))


def test_a_module_unlike_its_declaration_is_refused():
    checkpoint = drawn_checkpoint(pico_architecture())
    other = rank_parameters(pico_architecture(intermediate_size=51), ParallelLayout(), 0, 0)
    with pytest.raises(LayoutError, match=r"(?s)differ from the declared placement.*mlp.gate_proj.weight', \(51, 24\)"):
        check_parameters(plain(checkpoint), other)


def test_a_teacher_with_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="its vocabulary has 99 entries, the model's 101"):
        check_vocabularies(pico_architecture(), pico_architecture(vocab_size=99))
