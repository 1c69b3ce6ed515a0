"""Families beside Llama's kin are transformers' models too: names, order, loss, gradients, initialization."""

import pytest
import torch
from test_plain_model import batch, plain, transformers_model

from incr_ds.arch.training import check_trainable
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.model.attention import check_capped_scores
from incr_ds.model.weights import FreshWeights
from incr_ds.sharding.placement import check_layout, rank_parameters
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import TRAINED_BESIDE

# What changes the forward pass, away from its default.
VARIANTS = {
    "gpt_neox": {"use_parallel_residual": False},
    "gpt2": {"scale_attn_weights": False},
    "opt": {"enable_bias": False},
    "phi3": {"sliding_window": 5},
    "smollm3": {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "olmo3": {"attention_bias": True, "sliding_window": 4},
    "ministral3": {"sliding_window": 4},
    "stablelm": {"use_qkv_bias": True},
    "granite": {"attention_bias": True, "mlp_bias": True, "logits_scaling": 0.3},
    "cohere": {"attention_bias": True, "logit_scale": 1.7},
    "starcoder2": {"use_bias": False, "sliding_window": 4},
    "olmo2": {"attention_bias": True},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "gemma3_text": {
        "final_logit_softcapping": 3.0,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "variant"], ids=str)
@pytest.mark.parametrize("family", TRAINED_BESIDE)
def test_loss_and_gradients_equal_transformers(family: str, changes):
    checkpoint = drawn_checkpoint(small_architecture(family, **(VARIANTS[family] if changes == "variant" else changes)))
    # Gemma 2 caps its scores, which only the eager attention does, with a softmax in fp32.
    eager = family == "gemma2"
    ours = plain(
        checkpoint, attention="eager" if eager else "sdpa", softcap=checkpoint.architecture.logit_softcap
    ).eval()
    theirs = transformers_model(checkpoint).eval()
    input_ids, labels = batch()
    loss = ours(input_ids, labels).loss
    expected = torch.nn.functional.cross_entropy(theirs(input_ids).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6 if eager else 1e-9, atol=1e-12)
    loss.backward(), expected.backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if eager else {"rtol": 1e-7, "atol": 1e-11}
    mine, found = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(found)
    for name, parameter in mine.items():
        torch.testing.assert_close(
            parameter.grad, found[name].grad, msg=lambda text, n=name: f"{n}: {text}", **tolerance
        )


@pytest.mark.parametrize("family", TRAINED_BESIDE)
def test_fresh_weights_are_transformers_own(family: str):
    architecture = small_architecture(family, tie_word_embeddings=False)
    theirs = dict(transformers_fresh(architecture).named_parameters())
    fresh = FreshWeights(architecture, seed=0)
    for shard in rank_parameters(architecture, ParallelLayout(), 0, 0):
        values, expected = fresh.read(shard), theirs[shard.tensor.name].detach()
        if shard.tensor.is_matrix:
            assert values.std().item() == pytest.approx(expected.std().item(), rel=0.1), shard.tensor.name
        else:
            assert torch.equal(values, expected), shard.tensor.name


def transformers_fresh(architecture):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(architecture.config)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


@pytest.mark.parametrize(("family", "field"), [("gpt2", "embd_pdrop"), ("gpt_neox", "hidden_dropout")])
def test_the_embedding_is_dropped_out_as_transformers_does(family: str, field):
    others = {"resid_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {"attention_dropout": 0.0}
    checkpoint = drawn_checkpoint(small_architecture(family, **others, **{field: 0.5}))
    losses = []
    input_ids, labels = batch()
    for model in (plain(checkpoint), transformers_model(checkpoint)):
        torch.manual_seed(4)
        found = model.train()(input_ids, labels).loss if model.__class__.__name__ == "LanguageModel" else None
        logits = None if found is not None else model(input_ids).logits.flatten(0, 1)
        losses.append(found if found is not None else torch.nn.functional.cross_entropy(logits, labels.flatten()))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "q, k and v lie side by side in one Conv1D"),
        ("phi3", "q, k and v lie side by side in one matrix, gate and up in another"),
        ("olmo2", "its norms of queries and keys are over all heads at once"),
        ("opt", "transformers' attention counts on all heads being there"),
        ("stablelm", "transformers' attention counts on all heads being there"),
        ("olmo3", "its norms of queries and keys are over all heads at once"),
    ],
)
def test_what_is_not_cut_over_tensor_ranks_says_why(family: str, reason):
    with pytest.raises(
        LayoutError, match=f"tensor_parallel 2: {family} is not cut over tensor ranks: {reason}.*zero_stage 3"
    ):
        check_layout(small_architecture(family), ParallelLayout(tensor_parallel=2))
    check_layout(small_architecture(family), ParallelLayout(pipeline_parallel=2))


def test_capped_scores_need_eager_attention():
    with pytest.raises(ConfigError, match="model.attention: sdpa: gemma2 caps its attention scores, .*; set eager"):
        check_capped_scores("sdpa", small_architecture("gemma2"))
    check_capped_scores("eager", small_architecture("gemma2"))
    check_capped_scores("sdpa", small_architecture("gemma3_text"))


def test_layers_that_are_left_out_at_random_are_refused():
    with pytest.raises(ConfigError, match=r"layerdrop is 0.1; opt is trained here with 0.0 only"):
        check_trainable(small_architecture("opt", layerdrop=0.1))
