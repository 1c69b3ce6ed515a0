"""The repetition gain and the effective rank, of models and matrices whose answers are known."""

import math

import pytest
import torch

from incr_ds.offline.repetition import repetition_gain
from incr_ds.study.measures import effective_rank

VOCABULARY, LENGTH = 50, 20


class Answers(torch.nn.Module):
    """A model that gives the token ``behind`` places back, after the current one, a logit of ``sure``; all others get 0."""

    def __init__(self, behind: int, sure: float) -> None:
        super().__init__()
        self.behind, self.sure = behind, sure

    def forward(self, tokens: torch.Tensor) -> "Answers":
        """``logits`` [B, S, V] are for the token after each of ``tokens`` [B, S]."""
        self.logits = torch.zeros(*tokens.shape, VOCABULARY)
        seen = tokens[:, : tokens.shape[1] - self.behind]
        self.logits[:, self.behind :].scatter_(-1, seen[..., None], self.sure)
        return self


def test_a_model_that_copies_gains_from_a_repetition():
    sure = 5.0
    copies = Answers(LENGTH // 2 - 1, sure)  # where the half that is repeated has the next token
    expected = math.log(VOCABULARY) - math.log((math.exp(sure) + VOCABULARY - 1) / math.exp(sure))
    assert repetition_gain(copies, VOCABULARY, LENGTH) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_does_not_copy_gains_nothing():
    assert repetition_gain(Answers(LENGTH // 2 - 1, 0.0), VOCABULARY, LENGTH) == pytest.approx(0.0, abs=1e-6)
    assert abs(repetition_gain(Answers(0, 1.0), VOCABULARY, LENGTH)) < 0.05  # it repeats the current token


def test_the_effective_rank_of_equal_and_of_lone_singular_values():
    assert effective_rank(3 * torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 7))) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)
