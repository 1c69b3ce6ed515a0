"""Each kernel setting is measured in a process of its own, or is listed with the reason why not."""

import json
from pathlib import Path

import pytest
from bench_layers import VARIANTS, main


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench_layers.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.slow
def test_settings_are_measured_or_say_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sizes = ("--layers", 1, "--batch", 1, "--sequence-length", 16, "--repeats", 2)
    only = ("--only", "cudnn-liger", "--only", "torch")
    assert run(monkeypatch, "--output", tmp_path, *sizes, *only, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "layers.json").read_text())
    fused, adam = printed["measurements"]
    assert "model.attention: cudnn needs a CUDA device" in fused["absent"]
    assert adam["measured"] == "AdamW step" and adam["milliseconds"] > 0
    table = (tmp_path / "layers.md").read_text()
    assert "| layers | cudnn-liger | model.attention: cudnn needs" in table and "| AdamW step | torch |" in table


def test_every_setting_of_the_run_file_has_a_variant():
    settings = [sections for _, sections in VARIANTS.values()]
    assert {"model": {"attention": "cudnn"}} in settings and {"model": {"layer_kernels": "liger"}} in settings
    assert {"optimizer": {"implementation": "deepspeed"}} in settings


def test_an_unknown_variant_is_a_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "--output", tmp_path, "--only", "flash") == 2
    assert "--only flash: unknown; the variants are sdpa, cudnn, liger" in capsys.readouterr().err
