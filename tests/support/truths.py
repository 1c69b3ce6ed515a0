"""Checkpoints whose every element is known."""

import torch

from incr_ds.testing.memory import small_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

STATES = ("weight", "exp_avg", "exp_avg_sq")


def truth(**changes):
    return SyntheticCheckpoint(small_architecture("llama", **changes))


def same(found, expected):
    assert found.facts.step == expected.facts.step == 100
    for spec in expected.architecture.stored:
        for state in STATES:
            read = found.read(spec.name, state)
            assert torch.equal(read, expected.read(spec.name, state)), (spec.name, state)
