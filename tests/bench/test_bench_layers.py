"""Each kernel setting is measured in a process of its own, or is listed with the reason why not."""

import json
from pathlib import Path

import pytest
import torch
from bench_layers import VARIANTS, Work, _default_config, _run, main, measure

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.arch.flops import forward_flops_per_token


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
    only = ("--only", "cudnn-liger", "--only", "grouped", "--only", "torch")
    assert run(monkeypatch, "--output", tmp_path, *sizes, *only, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "layers.json").read_text())
    fused, grouped, adam = printed["measurements"]
    assert "model.attention: cudnn needs a CUDA device" in fused["absent"]
    assert grouped["measured"] == "layers of experts" and grouped["milliseconds"] > 0
    assert adam["measured"] == "AdamW step" and adam["milliseconds"] > 0
    table = (tmp_path / "layers.md").read_text()
    assert "| layers | cudnn-liger | model.attention: cudnn needs" in table and "| AdamW step | torch |" in table


def test_every_setting_of_the_run_file_has_a_variant():
    settings = [sections for _, sections in VARIANTS.values()]
    assert {"model": {"attention": "cudnn"}} in settings and {"model": {"layer_kernels": "liger"}} in settings
    assert {"optimizer": {"implementation": "deepspeed"}} in settings
    assert {"model": {"experts": "grouped"}} in settings and {"model": {"experts": "eager"}} in settings


def test_the_mixture_computes_as_much_for_each_token_as_the_dense_layers():
    dense, mixture = (
        architecture_from_config(
            _default_config(_run(sections), torch.device("cpu")) | {"num_hidden_layers": 2}, "test"
        )
        for _, sections in (VARIANTS["sdpa"], VARIANTS["grouped"])
    )
    router = 2 * 2 * 128 * 64
    assert forward_flops_per_token(mixture, 16) - router == forward_flops_per_token(dense, 16)


def test_a_dense_config_has_no_layers_of_experts(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2}))
    found = measure("grouped", Work(path, 1, 1, 8, 1))
    assert "model.experts: grouped: a llama has no experts" in found["absent"]


def test_an_unknown_variant_is_a_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "--output", tmp_path, "--only", "flash") == 2
    assert "--only flash: unknown; the variants are sdpa, cudnn, liger" in capsys.readouterr().err
