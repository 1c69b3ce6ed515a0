"""A source without files that Muon trained, for tests that write and read its momentum."""

from dataclasses import replace

from incr_ds.checkpoint.base import MUON_STATES
from incr_ds.checkpoint.deepspeed.writer import ADAMW_DEFAULTS
from incr_ds.sharding.optimizer_groups import set_apart
from incr_ds.testing.synthetic import SyntheticCheckpoint

MUON_GROUP = {"use_muon": True, "momentum": 0.95, "lr": 0.02, "weight_decay": 0.1, "ns_method": "gram"}


class TrainedByMuon(SyntheticCheckpoint):
    """Matrices of layers have a momentum_buffer, all other tensors Adam's moments."""

    def __init__(self, architecture):
        super().__init__(architecture)
        first, last = ({**ADAMW_DEFAULTS, "use_muon": False, "weight_decay": decay} for decay in (0.1, 0.0))
        own = {"momentum": set_apart("muon", architecture), "optimizer_groups": (first, MUON_GROUP, last)}
        self.facts = replace(self.facts, states=MUON_STATES, **own)

    def read(self, name, state="weight", bounds=None):
        assert state in self.facts.states_of(name), (name, state)
        return super().read(name, state, bounds)
