"""A table of learned positions has an end, and a request for more tokens is refused before anything runs."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from incr_ds.arch.architecture import check_context
from incr_ds.errors import ConfigError
from incr_ds.offline.compare import compare, random_batches
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture
from incr_ds.train.evaluation import evaluate_checkpoint
from incr_ds.train.inputs import open_data


def run_tool(name, *arguments):
    previous, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(name).main()
    finally:
        sys.argv = previous
    return ended.value.code


def test_tools_measure_within_a_short_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """GPT-2 with 64 positions: 128 tokens a sample are too many."""
    source, recipe, output = tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "grown"
    drawn_model(small_architecture("gpt2"), torch.float32).save_pretrained(source)
    recipe.write_text(
        "target: {n_layer: 5}\ndepth: {new: copy}\noptimizer: reset\nlayout: {format: huggingface}\n", encoding="utf-8"
    )
    assert run_tool("grow_checkpoint", "--source", source, "--recipe", recipe, "--output", output) == 0
    assert "over 504 tokens drawn at random" in " ".join(capsys.readouterr().out.split())  # 8 x 63 predicted tokens
    assert run_tool("verify_checkpoint", output, "--against", source) == 0
    assert run_tool("verify_checkpoint", output, "--against", source, "--length", 65) == 2
    assert "65 tokens per sample, but this gpt2 has 64 learned positions" in " ".join(capsys.readouterr().err.split())


def test_every_measurement_checks_it():
    architecture = small_architecture("opt")
    checkpoint = model_checkpoint(architecture, drawn_model(architecture))
    with pytest.raises(ConfigError, match=r"opt has 64 learned positions \(max_position_embeddings\); use at most 64"):
        compare(checkpoint, checkpoint, random_batches(101, 1, 65))
    with pytest.raises(ConfigError, match="70 tokens per sample"):
        evaluate_checkpoint(checkpoint, "none", 70, 1)
    with pytest.raises(ConfigError, match=r"batch\.sequence_length: 65 tokens per sample"):
        open_data(SimpleNamespace(batch=SimpleNamespace(sequence_length=65)), architecture)
    check_context(small_architecture("llama"), 10**6, "rotary positions have no end")
