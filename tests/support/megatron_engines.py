"""Child processes of test_megatron: DeepSpeed's pipeline of modules with Megatron's parameter names, without its arithmetic."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from incr_ds.arch.architecture import saved_architecture


def leaf(*shape):
    module = nn.Module()
    module.weight = nn.Parameter(torch.full(shape, float("nan")))
    return module


class EmbeddingPipe(nn.Module):
    def __init__(self, vocab, hidden):
        super().__init__()
        self.word_embeddings = leaf(vocab, hidden)

    @property
    def word_embeddings_weight(self):
        return self.word_embeddings.weight

    def forward(self, x):
        return x


class ParallelTransformerLayerPipe(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        hidden, width, kv = sizes["hidden"], sizes["heads"] * sizes["head_dim"], sizes["kv_heads"] * sizes["head_dim"]
        self.input_layernorm = leaf(hidden)
        self.self_attention = nn.Module()
        self.self_attention.query_key_value = leaf(width + 2 * kv, hidden)
        self.self_attention.dense = leaf(hidden, width)
        self.post_attention_layernorm = leaf(hidden)
        self.mlp = nn.Module()
        self.mlp.dense_h_to_4h = leaf(2 * sizes["ffn"], hidden)
        self.mlp.dense_4h_to_h = leaf(hidden, sizes["ffn"])

    def forward(self, x):
        return x


class RMSNorm(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden,), float("nan")))

    def forward(self, x):
        return x


def reload_in_pipeline(native, universal):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for folder, load_universal in ((native, False), (universal, True)):
        engine = _engine(saved_architecture(Path(folder) / "config.json"), load_universal)
        path, _ = engine.load_checkpoint(folder, load_lr_scheduler_states=False)
        assert path is not None
        engine.save_checkpoint(f"{folder}-again", tag="again")
        if os.environ["RANK"] == "0":
            assert json.loads((Path(folder) / "config.json").read_text())
        engine.destroy()


def _engine(architecture, load_universal):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    sizes = architecture.sizes
    vocab, hidden = sizes["vocab"], sizes["hidden"]
    embedding = ("embed", EmbeddingPipe, vocab, hidden)
    layers = [
        lambda x: x,
        TiedLayerSpec(*embedding, tied_weight_attr="word_embeddings_weight"),
        *[LayerSpec(ParallelTransformerLayerPipe, sizes) for _ in range(sizes["layers"])],
        LayerSpec(RMSNorm, hidden),
        TiedLayerSpec(*embedding, forward_fn=lambda module, x: x, tied_weight_attr="word_embeddings_weight"),
    ]
    model = PipelineModule(layers, num_stages=2, partition_method="type:transformer", loss_fn=lambda x, y: x.sum())
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": load_universal},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config)[0]
