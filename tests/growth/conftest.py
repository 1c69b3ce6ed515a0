"""Exactness is shown in fp64, so transformers' RMSNorm, which computes in fp32, is replaced by one that does not."""

import importlib

import pytest
import torch


def _rms_norm_in_input_dtype(self, hidden_states):
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture
def fp64_norms(monkeypatch):
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", _rms_norm_in_input_dtype)
