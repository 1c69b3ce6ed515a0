"""Multipliers of single tensors: how they combine, and the file that holds them."""

import json
from pathlib import Path

import pytest

from incr_ds.arch.multipliers import (
    FILE,
    UNCHANGED,
    Multipliers,
    multipliers_text,
    read_multipliers,
    rounded_multipliers,
)
from incr_ds.errors import CheckpointError, ConfigError


def test_the_file_reads_back(tmp_path: Path):
    multipliers = {
        "a": Multipliers(0.5, 0.25, 2.0),
        "b": Multipliers(0.1, 1 / 3, 10.0),
        "c": Multipliers(0.5, 0.25, 2.0),
    }
    (tmp_path / FILE).write_text(multipliers_text({**multipliers, "d": UNCHANGED}))
    assert read_multipliers(tmp_path) == multipliers
    assert read_multipliers(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", CheckpointError, "multipliers.json: not valid JSON.*or remove it"),
        (
            '{"version": 1, "groups": [{"lr": 0.0, "eps": 1.0, "weight_decay": 1.0, "tensors": ["a"]}]}',
            ConfigError,
            "groups.0.lr",
        ),
        ('{"version": 2, "groups": []}', ConfigError, "version"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text, kind, message: str):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(kind, match=message):
        read_multipliers(tmp_path)


def test_two_growths_in_a_row_multiply():
    third = rounded_multipliers(1 / 3, 1 / 3)
    assert third.weight_decay == pytest.approx(3.0)
    both = Multipliers(0.5, 2.0, 2.0).after(third)
    assert (both.lr, both.eps, both.weight_decay) == pytest.approx((1 / 6, 2 / 3, 6.0))


def test_settings_come_back():
    group = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    multipliers = Multipliers(0.25, 0.5, 4.0)
    assert multipliers.applied(group) == {"lr": 0.025, "eps": 5e-9, "weight_decay": 0.4, "betas": (0.9, 0.95)}
    assert multipliers.removed(multipliers.applied(group)) == group


def test_a_file_under_its_old_name_is_not_passed_over(tmp_path: Path):
    (tmp_path / "optimizer_groups.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"optimizer_groups\.json: this file is multipliers\.json now; grow or train"
    ):
        read_multipliers(tmp_path)


def test_a_tensor_that_is_named_twice_is_refused(tmp_path):
    groups = [
        {"lr": 0.5, "eps": 1.0, "weight_decay": 1.0, "tensors": ["a", "b"]},
        {"lr": 2.0, "eps": 1.0, "weight_decay": 1.0, "tensors": ["b"]},
    ]
    (tmp_path / "multipliers.json").write_text(json.dumps({"version": 1, "groups": groups}))
    with pytest.raises(CheckpointError, match=r"multipliers.json: tensor b is named 2 times; name it in one group"):
        read_multipliers(tmp_path)
