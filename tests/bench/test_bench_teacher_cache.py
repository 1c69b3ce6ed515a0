"""The benchmark's rows: more entries err less, all of them not at all, and fp16 adds little."""

import pytest
import torch
from bench_teacher_cache import measure

from incr_ds.testing.memory import SMALL, drawn_model, small_architecture


def test_more_entries_err_less_and_the_whole_vocabulary_does_not(tmp_path):
    for name, layers in (("teacher", 2), ("student", 1)):
        sizes = {"num_hidden_layers": layers, "initializer_range": 0.5}
        drawn_model(small_architecture("llama", **sizes), torch.float32).save_pretrained(tmp_path / name)
    tokens = torch.randint(0, SMALL["vocab"], (3, 17), generator=torch.Generator().manual_seed(0))
    found = measure(tmp_path / "teacher", tmp_path / "student", tokens)
    rows = {(row["top_k"], row["stored"]): row for row in found["rows"]}
    assert list(rows) == [(k, stored) for k in (4, 16, 64, SMALL["vocab"]) for stored in ("fp16", "fp32")]
    errors = [rows[k, "fp32"]["gradient_error"] for k in (4, 16, 64, SMALL["vocab"])]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] == 0
    assert 0 < rows[SMALL["vocab"], "fp16"]["gradient_error"] < 2e-3
    divergences = [rows[k, "fp32"]["divergence"] for k in (4, 16, 64, SMALL["vocab"])]
    assert divergences == sorted(divergences) and divergences[-1] == pytest.approx(found["divergence"])
    assert rows[16, "fp16"]["bytes_per_token"] == 16 * 3 and rows[16, "fp32"]["bytes_per_token"] == 16 * 5
