"""A folder of transformers' Trainer under DeepSpeed is DeepSpeed's, moments included, proved by the weights beside it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainers import train

from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.processes import run_processes


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_folder(tmp_path: Path, stage):
    run_processes(train, 2, str(tmp_path), stage)
    folder = tmp_path / "checkpoint-2"
    checkpoint = open_source(folder)
    assert checkpoint.facts.kind == f"DeepSpeed ZeRO-{stage}" and checkpoint.facts.step == 2
    assert {"exp_avg", "exp_avg_sq"} <= set(checkpoint.facts.states)
    exported = load_file(folder / "model.safetensors")
    for spec in checkpoint.architecture.stored:
        assert torch.equal(checkpoint.read(spec.name).to(exported[spec.name].dtype), exported[spec.name]), spec.name
        assert checkpoint.read(spec.name, "exp_avg_sq").any()
    assert len(list(checkpoint.self_check())) == len(checkpoint.architecture.stored)
