"""The loss of one token over two vocabulary entries, with every number written out."""

from math import log

import torch

from incr_ds.losses.distillation import distillation_loss


def test_one_token():
    """The student says (1/3, 2/3), the teacher (3/4, 1/4), and the label is entry 1."""
    identity = torch.eye(2, dtype=torch.float64)  # as output head, so that the hidden state is the logits
    student = torch.tensor([[0.0, log(2)]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[log(3), 0.0]], dtype=torch.float64)
    found = distillation_loss(student, identity, torch.tensor([1]), teacher, identity, alpha=0.5)

    cross_entropy = -log(2 / 3)  # 0.4055
    divergence = 3 / 4 * log((3 / 4) / (1 / 3)) + 1 / 4 * log((1 / 4) / (2 / 3))  # 0.3630
    assert abs(float(found.ce) - cross_entropy) < 1e-12
    assert abs(float(found.divergence) - divergence) < 1e-12
    assert abs(float(found.loss.detach()) - (cross_entropy + divergence) / 2) < 1e-12

    found.loss.backward()
    # (1 - alpha) (p - label) + alpha (p - q) = ((1/3, -1/3) + (-5/12, 5/12)) / 2
    expected = torch.tensor([[-1 / 24, 1 / 24]], dtype=torch.float64)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-12)
