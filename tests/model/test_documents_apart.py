"""With reset_at_document_end, documents in a sequence have the logits that each has alone. transformers runs them alone."""

import pytest
import torch
from engine_cases import END, documents_of
from test_plain_model import ONE_RANK, transformers_model

from incr_ds.model.layers import LayerFactory
from incr_ds.model.plain import LanguageModel
from incr_ds.model.positions import document_positions
from incr_ds.model.weights import CheckpointWeights
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import FAMILIES, TRAINED_BESIDE, pico_architecture


def test_positions_by_hand():
    ids = torch.tensor([[7, 7, END, 7, 7], [END, END, 7, END, 7], [7, 7, 7, 7, 7], [7, 7, 7, 7, END]])
    expected = [[0, 1, 2, 0, 1], [0, 0, 0, 1, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert document_positions(ids, END).tolist() == expected


def model_of(checkpoint, dtype, attention, end):
    device = torch.device("cpu")
    factory = LayerFactory(
        checkpoint.architecture, ONE_RANK, CheckpointWeights(checkpoint), dtype, device, attention, document_end=end
    )
    return LanguageModel(factory, range(checkpoint.architecture.num_layers + 3)).eval()


def packed():
    """Rows that begin and end with an END, have two in a row, and none at all."""
    ids = torch.randint(20, 101, (4, 24), generator=torch.Generator().manual_seed(3))
    ids[0, [0, 9, 10, 23]] = END
    ids[1, 12] = END
    ids[2, [3, 7]] = END
    return ids


def alone(model, ids):
    return torch.stack([torch.cat([model(part[None]).logits[0] for part in documents_of(row)]) for row in ids])


@torch.no_grad()
def logits(model, ids):
    hidden = model.hidden_states(ids)
    return hidden @ model.lm_head.weight.T


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, *TRAINED_BESIDE])
def test_packed_documents_have_the_logits_that_they_have_alone(family, attention):
    """fp64. Windows of 5 (Mistral) and learned positions (GPT-2, OPT) are among the families."""
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("its scores are capped, which only eager does")
    made = pico_architecture(family) if family in FAMILIES else small_architecture(family)
    checkpoint, ids = drawn_checkpoint(made), packed()
    theirs = transformers_model(checkpoint).eval()
    cap = made.logit_softcap
    with torch.no_grad():
        expected = alone(theirs, ids)
        whole = theirs(ids).logits

    def capped(values):
        return values if cap is None else cap * torch.tanh(values / cap)

    found = capped(logits(model_of(checkpoint, torch.float64, attention, END), ids))
    # transformers' norms are in fp32, and so is the softmax of eager attention, which sums over other lengths here.
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if attention == "sdpa" else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found, expected, **tolerance)
    assert (found - whole).abs().max() > 1e-3, "without the reset they differ"
    without = capped(logits(model_of(checkpoint, torch.float64, attention, None), ids))
    torch.testing.assert_close(without, whole, **tolerance)


def test_a_model_may_alternate_between_packed_and_other_positions():
    """The cache of the arguments of a shape must not outlive the documents."""
    checkpoint = drawn_checkpoint(pico_architecture("llama"))
    model, ids = model_of(checkpoint, torch.float64, "sdpa", END), packed()
    first, second = logits(model, ids), logits(model, ids.flip(1))
    again = logits(model, ids)
    assert torch.equal(first, again) and not torch.equal(first, second.flip(1))
    no_ends = ids.clamp(min=20)
    torch.testing.assert_close(
        logits(model, no_ends), logits(model_of(checkpoint, torch.float64, "sdpa", None), no_ends)
    )
