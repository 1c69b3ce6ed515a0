"""Exactness is shown in fp64, so what transformers computes in fp32 (RMSNorm, eager softmax) is replaced in tests."""

import importlib

import pytest
import torch
from transformers.models.cohere import modeling_cohere as cohere

NORMS = {
    "llama": "LlamaRMSNorm",
    "mistral": "MistralRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "olmo2": "Olmo2RMSNorm",
    "phi3": "Phi3RMSNorm",
    "smollm3": "SmolLM3RMSNorm",
    "olmo3": "Olmo3RMSNorm",
    "granite": "GraniteRMSNorm",
    "ministral3": "Ministral3RMSNorm",
}
OFFSET_NORMS = {"gemma2": "Gemma2RMSNorm", "gemma3": "Gemma3RMSNorm"}


def _normed(hidden_states, eps):
    return hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + eps)


def _rms_norm(self, hidden_states):
    return self.weight * _normed(hidden_states, self.variance_epsilon)


def _offset_rms_norm(self, hidden_states):
    return (1.0 + self.weight) * _normed(hidden_states, self.eps)


def _centred_norm(self, hidden_states):
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    return self.weight * _normed(centred, self.variance_epsilon)


def _rotated(queries, keys, cos, sin, unsqueeze_dim=1):
    """Cohere's rotary positions (pairs side by side), in the dtype that they are given."""

    def turned(states):
        halves = torch.stack([-states[..., 1::2], states[..., ::2]], dim=-1).flatten(-2)
        return states * cos.unsqueeze(unsqueeze_dim) + halves * sin.unsqueeze(unsqueeze_dim)

    return turned(queries), turned(keys)


@pytest.fixture
def fp64_norms(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cohere, "apply_rotary_pos_emb", _rotated)
    for names, forward in (
        (NORMS, _rms_norm),
        (OFFSET_NORMS, _offset_rms_norm),
        ({"cohere": "CohereLayerNorm"}, _centred_norm),
    ):
        for family, name in names.items():
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            monkeypatch.setattr(getattr(module, name), "forward", forward)
    softmax = torch.nn.functional.softmax
    # Gemma 2 soft-caps its scores, which only the eager attention does, with a softmax in fp32.
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim=dim))
