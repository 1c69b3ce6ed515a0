"""Checkpoints whose every element is known."""

import torch

from incr_ds.checkpoint.base import STATES
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint


def truth(family="llama", **changes):
    return SyntheticCheckpoint(small_architecture(family, **changes))


def same(found, expected):
    assert found.facts.step == expected.facts.step == 100
    same_values(found, expected)


def same_values(found, expected, states=STATES, cast=None):
    """Every tensor bit for bit; ``cast`` is the dtype in which it was stored."""
    for spec in expected.architecture.stored:
        for state in states:
            whole = expected.read(spec.name, state)
            assert torch.equal(found.read(spec.name, state), whole.to(cast or whole.dtype)), (spec.name, state)
