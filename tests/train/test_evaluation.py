import json
import math

import numpy as np
import pytest
import torch
from token_data import write_documents

from incr_ds.errors import ConfigError
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture
from incr_ds.train.evaluation import bits_per_byte, evaluate_checkpoint


def write(folder, largest=101):
    ids = np.random.default_rng(0).integers(0, largest, 6 * 9 + 1).tolist()
    return write_documents(folder / "x_validation_text_document", [ids]), torch.tensor(ids)


def test_the_loss_is_transformers_own_over_every_sample(tmp_path):
    prefix, ids = write(tmp_path)
    architecture = small_architecture("llama", tie_word_embeddings=True)
    model = drawn_model(architecture, torch.float32)
    samples = torch.stack([ids[start : start + 10] for start in range(0, 54, 9)])
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()
    (tmp_path / "x_facts.json").write_text(json.dumps({"splits": {"validation": {"tokens": 55, "bytes": 220}}}))
    found = evaluate_checkpoint(model_checkpoint(architecture, model), prefix, 9, 6)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 4, rel=1e-6)
    assert found.tokens == 54


def test_bits_per_byte_are_unknown_without_facts(tmp_path):
    assert bits_per_byte(2.0, str(tmp_path / "x_validation_text_document")) is None


def test_data_of_another_vocabulary_is_refused(tmp_path):
    prefix, _ = write(tmp_path, largest=500)
    architecture = small_architecture("llama")
    with pytest.raises(ConfigError, match="exceeds the model's vocab_size 101"):
        evaluate_checkpoint(model_checkpoint(architecture, drawn_model(architecture)), prefix, 9, 6)
