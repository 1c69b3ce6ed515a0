"""The public surface, frozen: a change here is a change for users and belongs into CHANGELOG.md."""

import subprocess
import sys
from pathlib import Path

import pytest

import incr_ds

NAMES = [
    "GrowthRecipe",
    "GrowthRequest",
    "IncrError",
    "compare",
    "distillation_loss",
    "export_huggingface",
    "grow_checkpoint",
    "open_source",
    "plan_growth",
    "plan_request",
]


def test_names():
    assert sorted(incr_ds.__all__) == NAMES == dir(incr_ds)
    assert len(NAMES) <= 10
    for name in NAMES:
        assert getattr(incr_ds, name).__name__ == name


def test_no_name_is_hidden_by_a_module():
    """A submodule becomes an attribute of the package when imported, and would take the place of a public name."""
    modules = {path.stem for path in Path(incr_ds.__file__).parent.iterdir()}
    assert not modules & set(NAMES)


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"no attribute 'shrink'; its public names: GrowthRecipe, GrowthRequest"):
        incr_ds.shrink  # noqa: B018


def test_import_is_light():
    """Neither the package nor planning a growth loads DeepSpeed, Triton or megatron."""
    program = (
        "import sys, incr_ds\n"
        "assert 'torch' not in sys.modules\n"
        "incr_ds.plan_request, incr_ds.distillation_loss\n"
        "assert 'triton' not in sys.modules\n"
        "incr_ds.compare\n"  # transformers, and with it the parts of torch that take Triton where it is installed
        "found = {'deepspeed', 'megatron'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
