"""The quickstart compares at equal total FLOPs."""

from pathlib import Path

import pytest

from incr_ds.arch.architecture import saved_architecture
from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.config.fields import load_settings
from incr_ds.config.training import RunSettings

CONFIGS = Path(__file__).parents[2] / "ds_configs"


def test_scratch_gets_the_flops_of_source_grown_model_and_teacher():
    source, grown, scratch = (
        load_settings(CONFIGS / f"runs/quickstart-{name}.yaml", RunSettings) for name in ("source", "grown", "scratch")
    )
    small, large = (saved_architecture(CONFIGS / f"models/quickstart-{name}.json") for name in ("source", "grown"))

    def tokens(run: RunSettings, steps: int) -> int:
        return steps * run.batch.global_batch_size * run.batch.sequence_length

    spent = tokens(source, source.schedule.train_steps) * training_flops_per_token(small, 128)
    spent += tokens(grown, grown.schedule.train_steps) * training_flops_per_token(large, 128)
    spent += tokens(grown, grown.distillation.anneal_steps) * forward_flops_per_token(small, 128)
    of_scratch = tokens(scratch, scratch.schedule.train_steps) * training_flops_per_token(large, 128)
    assert of_scratch == pytest.approx(spent, rel=2e-3)
