"""The router loss and the load of experts, by hand; the engine's equality with transformers is in tests/train."""

import pytest
import torch
from torch import nn

from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.multipliers import Multipliers
from incr_ds.arch.training import check_shared_samples, router_factor
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import ObjectiveSettings
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.model.routing import Router, Routing, routing_result
from incr_ds.sharding.optimizer_groups import group_count, set_apart
from incr_ds.testing.memory import small_architecture


class Gate(nn.Module):
    """Tokens choose experts as they are asked to."""

    def forward(self, logits, chosen):
        return logits, chosen.float(), chosen


def routed(logits, chosen):
    gate = Gate()
    router = Router(gate)
    gate(logits, torch.tensor(chosen))
    return router.take()


def test_an_even_spread_has_the_loss_of_the_experts_per_token():
    # 4 tokens, 4 experts, 2 for each token: every expert has 2 of the 8 choices, and probabilities of a quarter.
    loss, counts = routed(torch.zeros(4, 4), [[0, 1], [1, 2], [2, 3], [3, 0]])
    assert counts.tolist() == [2, 2, 2, 2] and loss.item() == pytest.approx(2.0)


def test_a_spread_by_hand_and_its_gradient():
    # P = softmax of one token's logits [log 3, 0, 0, 0] = [1/2, 1/6, 1/6, 1/6]; f = [1, 1, 0, 0].
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0]]).log().requires_grad_()
    loss, counts = routed(logits, [[0, 1]])
    assert counts.tolist() == [1, 1, 0, 0] and loss.item() == pytest.approx(4 * (1 / 2 + 1 / 6))
    loss.backward()
    # dL/dz_j = 4 P_j (f_j - sum_i f_i P_i)
    expected = [4 * p * (f - 2 / 3) for p, f in zip([1 / 2, 1 / 6, 1 / 6, 1 / 6], [1, 1, 0, 0], strict=True)]
    torch.testing.assert_close(logits.grad, torch.tensor([expected]))


def test_layers_stages_and_micro_batches_add_up():
    routing = Routing(small_architecture("mixtral"))  # 3 layers, 4 experts
    for layer, loss, counts in ((0, 2.0, [6.0, 2, 0, 0]), (2, 3.0, [2.0, 2, 2, 2]), (0, 4.0, [2.0, 2, 4, 0])):
        routing.add(layer, torch.tensor(loss), torch.tensor(counts))
    assert routing.take_mean(torch.zeros(1)).tolist() == [3.0] and routing.take_mean(torch.zeros(1)).tolist() == [0.0]
    record = routing.take_record(torch.device("cpu"))
    assert record.tolist() == [[6, 8, 4, 4, 0], [0, 0, 0, 0, 0], [3, 2, 2, 2, 2]]
    record[1] = torch.tensor([5, 4.0, 4, 4, 4])  # another stage's
    result = routing_result(record, 2)
    assert result.loss == pytest.approx((3 + 2.5 + 1.5) / 3) and result.expert_load == 2.0
    assert routing.take_record(torch.device("cpu")).sum() == 0


def test_what_does_not_go_with_a_mixture():
    mixture, dense = small_architecture("mixtral"), small_architecture("llama")
    assert router_factor(ObjectiveSettings(), mixture) == 0.001 and router_factor(ObjectiveSettings(), dense) == 0.0
    assert router_factor(ObjectiveSettings(router=0.0), mixture) == 0.0
    with pytest.raises(
        ConfigError, match="loss.router: 0.2: a llama has no router, since it is not a mixture of experts"
    ):
        router_factor(ObjectiveSettings(router=0.2), dense)
    check_shared_samples(mixture, 1)
    with pytest.raises(
        LayoutError, match="batch.sequence_parallel 3: mixtral is a mixture of experts, whose router loss needs"
    ):
        check_shared_samples(mixture, 3)
    with pytest.raises(ConfigError, match="optimizer.name: muon does not go with mixtral"):
        set_apart("muon", mixture)
    frozen = frozen_tensors(mixture, ["*.experts.1.*"])
    with pytest.raises(
        ConfigError, match=r"model.freeze: .*experts.1.w1.weight is frozen and .*experts.0.w1.weight is not"
    ):
        group_count(mixture, ParallelLayout(), None, frozen)
    unlike = {"model.layers.0.block_sparse_moe.experts.2.w2.weight": Multipliers(lr=2.0, eps=1.0, weight_decay=1.0)}
    with pytest.raises(LayoutError, match=r"model.layers.0.mlp.experts.down_proj: its experts differ in learning-rate"):
        group_count(mixture, ParallelLayout(), unlike)
