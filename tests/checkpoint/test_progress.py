"""Tokens seen in training, as every kind of checkpoint records them."""

import json
from pathlib import Path

import pytest
import torch
from sources import write_synthetic

from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.pico import pico_architecture


@pytest.mark.parametrize(
    "layout", [{"data_parallel": 2}, {"data_parallel": 2, "zero_stage": 3}, {"format": "universal"}]
)
@pytest.mark.parametrize(
    ("noted", "tokens"),
    [
        ({"position": {"tokens": 12288}}, 12288),
        ({"tokens": 4096, "args": {"seq_length": 8}}, 4096),
        ({"tokens": 0}, None),
        ({"position": "x", "tokens": [5]}, None),
    ],
)
def test_tokens_in_a_model_file(tmp_path: Path, layout, noted, tokens):
    write_synthetic(tmp_path, pico_architecture(num_hidden_layers=1, vocab_size=11), **layout)
    path = min((tmp_path / "source").rglob("*mp_rank_00_model_states.pt"))
    torch.save(torch.load(path, weights_only=False) | noted, path)
    assert open_source(tmp_path / "source").facts.recorded.tokens == tokens


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        (json.dumps({"num_input_tokens_seen": 640}), 640),
        (json.dumps({"num_input_tokens_seen": 0}), None),
        ("[5", None),
        ("5", None),
    ],
)
def test_tokens_that_the_trainer_counted(tmp_path: Path, content, tokens):
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text(content)
    assert open_source(tmp_path).facts.recorded.tokens == tokens
