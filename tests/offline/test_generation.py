"""Text that a checkpoint writes: greedily, drawn, and what cannot be used."""

from pathlib import Path

import pytest
import torch

from incr_ds.checkpoint.integrity import open_described
from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.errors import IncrError
from incr_ds.offline.generation import Sampling, generate_text
from incr_ds.testing.memory import drawn_model
from incr_ds.testing.pico import pico_architecture

VOCABULARY = 330
SENTENCES = [f"The capital of country {number} is city {number * number % 97}." for number in range(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A model of two layers with a tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "model"
    train_sentencepiece(SENTENCES, VOCABULARY, folder)
    shape = pico_architecture("llama", tied=True, vocab_size=VOCABULARY, max_position_embeddings=256)
    drawn_model(shape, torch.float32).save_pretrained(folder)
    return folder


def test_generate_writes_the_same_greedily_and_other_text_when_it_draws(folder):
    source = open_described(folder)
    greedy = generate_text(source, folder, "The capital", 12)
    assert greedy.startswith("The capital") and greedy == generate_text(source, folder, "The capital", 12)
    drawn = [
        generate_text(source, folder, "The capital", 12, Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_names_what_it_cannot_use(folder, tmp_path: Path):
    source = open_described(folder)
    with pytest.raises(
        IncrError, match="transformers finds no tokenizer that it can load .*; pass one with --tokenizer"
    ):
        generate_text(source, tmp_path, "x", 3)
    with pytest.raises(IncrError, match="--prompt: the tokenizer gives no tokens for it"):
        generate_text(source, folder, "", 3)
