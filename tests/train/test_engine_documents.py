"""Training with reset_at_document_end, in plain engines and pipelines, is training on documents that are run alone."""

import json
from dataclasses import replace

import pytest
from engine_cases import END, Case
from test_engine_layouts import test_training_equals_one_process as check_training

# The teacher runs, fades out and comes back: stages exchange two or three tensors. Mistral has a window of 5, GPT-2 learned
# positions, and a middle stage of three sees no tokens.
CASES = [
    Case("llama", tied=True, pipeline=2, accumulation=4),
    Case("mistral", tied=False, pipeline=2, recompute=True, accumulation=1),
    Case("qwen3", tied=True, tensor=2, recompute=True, accumulation=2),
    Case("gpt2", tied=True, pipeline=2, accumulation=2),
    pytest.param(Case("qwen2", tied=False, data=2, zero=3, accumulation=2), marks=pytest.mark.slow),
    pytest.param(Case("llama", tied=False, pipeline=3, accumulation=4), marks=pytest.mark.slow),
    pytest.param(Case("qwen3", tied=True, tensor=2, pipeline=2, accumulation=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_on_packed_documents_equals_documents_alone(case, tmp_path):
    (tmp_path / "x_facts.json").write_text(json.dumps({"splits": {}, "end_of_text": END}))
    check_training(replace(case, documents=str(tmp_path / "x_train_text_document")))
