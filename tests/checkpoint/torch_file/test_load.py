"""What a .pt file may hold does not depend on what else the process imported."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy._core.multiarray import _reconstruct

from incr_ds.checkpoint.torch_file.load import Stub, load_pt
from incr_ds.errors import CheckpointError


def foreign():
    raise AssertionError("a function of another package ran")


@pytest.fixture
def allowed_elsewhere():
    """What megatron-core does when it is imported, and worse."""
    with torch.serialization.safe_globals([_reconstruct, np.ndarray, np.dtype, foreign]):
        yield


class Payload:
    def __reduce__(self):
        return foreign, ()


def test_what_others_allow_is_neither_run_nor_refused_anew(tmp_path: Path, allowed_elsewhere):
    state = {"weight": torch.arange(3.0), "rng": np.arange(5), "args": argparse.Namespace(seed=1)}
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    found = load_pt(tmp_path / "mp_rank_00_model_states.pt")
    assert torch.equal(found["weight"], torch.arange(3.0)) and isinstance(found["rng"], Stub)
    torch.save({"payload": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(
        CheckpointError, match="it was refused. If you trust the author of this file, repeat with --trust"
    ):
        load_pt(tmp_path / "bad.pt")
    assert foreign in torch.serialization.get_safe_globals()


def test_threads_read_at_once(tmp_path: Path):
    torch.save({"rng": np.arange(5)}, tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_pt(tmp_path / "a.pt"), range(64)))
    assert all(isinstance(one["rng"], Stub) for one in found)
    assert set(torch.serialization.get_safe_globals()) == before
