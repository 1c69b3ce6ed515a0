"""Megatron-core itself, on CPU ranks with gloo: its GPTModel, its optimizer, its dist_checkpointing.

Its save and load wait for a CUDA device and name it; here both do nothing.
"""

import argparse
import functools
import inspect
import multiprocessing
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as functional

VOCABULARY, LENGTH = 32, 8
SIZES = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 24}


_LAYER_NORM = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "num_query_groups": 4,
    "group_query_attention": False,
}
# The arguments that make the model a GPT-NeoX with one residual branch after the other, and a GPT-2.
GPT_NEOX = {**_LAYER_NORM, "rotary_percent": 0.5}
GPT2 = {
    **_LAYER_NORM,
    "position_embedding_type": "learned_absolute",
    "bias_gelu_fusion": True,
    "untie_embeddings_and_output_weights": False,
}
# Those of a Mixtral and of a Qwen3-MoE.
MIXTRAL = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 20}
QWEN3_MOE = {**MIXTRAL, "moe_router_topk": 3, "qk_layernorm": True, "kv_channels": 8}


def arguments(**further):
    """The arguments of Megatron-LM that describe the model."""
    given = {
        **SIZES,
        "kv_channels": 4,
        "group_query_attention": True,
        "max_position_embeddings": LENGTH,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "norm_epsilon": 1e-5,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "bias_gelu_fusion": False,
        "num_experts": None,
        "moe_ffn_hidden_size": None,
        "moe_router_topk": 2,
        "moe_grouped_gemm": False,
        "untie_embeddings_and_output_weights": True,
        "params_dtype": torch.float32,
        "consumed_train_samples": 96,
    }
    return argparse.Namespace(**{**given, **further})


def start(tensor_degree, pipeline_degree, expert_degree=1):
    multiprocessing.current_process()._config["daemon"] = False  # its writer starts processes of its own
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    with_torch_s_writer()
    torch._dynamo.config.disable = True  # its fused functions need not be compiled
    np.product = np.prod  # its name in numpy 1, by which megatron-core 0.14 and before call it
    from megatron.core import parallel_state, tensor_parallel

    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: nullcontext()  # only dropout needs it, and there is none
    parallel_state.initialize_model_parallel(tensor_degree, pipeline_degree, expert_model_parallel_size=expert_degree)


def with_torch_s_writer():
    """megatron-core 0.12 calls a function of torch that has had one more argument since."""
    from torch.distributed.checkpoint import filesystem

    if "serialization_format" in inspect.signature(filesystem._write_item).parameters:
        given = {"serialization_format": filesystem.SerializationFormat.TORCH_SAVE}
        filesystem._write_item = functools.wraps(filesystem._write_item)(
            functools.partial(filesystem._write_item, **given)
        )


def _config(given):
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{name: getattr(given, name) for name in SIZES},
        kv_channels=given.kv_channels,
        gated_linear_unit=given.swiglu,
        activation_func=functional.silu if given.swiglu else functional.gelu,
        add_bias_linear=given.add_bias_linear,
        add_qkv_bias=given.add_qkv_bias,
        qk_layernorm=given.qk_layernorm,
        normalization=given.normalization,
        layernorm_epsilon=given.norm_epsilon,
        use_cpu_initialization=True,
        bias_activation_fusion=given.bias_gelu_fusion,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        num_moe_experts=given.num_experts,
        moe_ffn_hidden_size=given.moe_ffn_hidden_size,
        moe_router_topk=given.moe_router_topk,
        moe_router_load_balancing_type="none",
    )


def model_of(given):
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)  # missing without Transformer Engine
    if given.moe_grouped_gemm:  # its kernels need a GPU, and its parameters do not
        from megatron.core.transformer.moe import grouped_gemm_util

        grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    tied = not given.untie_embeddings_and_output_weights
    model = GPTModel(
        _config(given),
        get_gpt_layer_local_spec(
            num_experts=given.num_experts,
            moe_grouped_gemm=given.moe_grouped_gemm,
            normalization=given.normalization,
            qk_layernorm=given.qk_layernorm,
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type=given.position_embedding_type,
        rotary_base=given.rotary_base,
        rotary_percent=given.rotary_percent,
        share_embeddings_and_output_weights=tied,
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases, which start at one and zero
            parameter.data += 0.3 * torch.linspace(-1, 1, parameter.numel()) * (1 + len(name) % 5)
        if "router" in name:  # so that the experts have unlike shares
            parameter.data *= 50
    return model


def optimizer_of(model, steps):
    """Megatron-core's optimizer after ``steps`` steps of Adam with gradients that are sines."""
    from megatron.core.optimizer.optimizer import FP32Optimizer

    decay = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    named = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    groups = [{"params": own, "wd_mult": mult, **named} for own, mult in ((decay, 1.0), (rest, 0.0)) if own]
    inner = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.sin(torch.arange(parameter.numel()).view_as(parameter) + float(step))
        inner.step()

    made = FP32Optimizer.__new__(FP32Optimizer)  # its constructor puts a loss scale on a CUDA device
    made.optimizer, made.is_stub_optimizer = inner, False
    return made


def logits_of(model):
    tokens = torch.arange(LENGTH)[None] * 3 % VOCABULARY
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    model.eval()
    with torch.no_grad():
        return model(tokens, torch.arange(LENGTH)[None], mask)


def _content(model, optimizer, given):
    content = model.sharded_state_dict()
    return {**content, "optimizer": optimizer.sharded_state_dict(content), "args": given, "iteration": 3}


def _save(content, folder):
    from megatron.core import dist_checkpointing

    path = Path(folder) / "iter_0000003"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    dist_checkpointing.save(content, str(path))


def _moments(model, optimizer):
    states = optimizer.optimizer.state
    return {
        name: (states[parameter]["exp_avg"], states[parameter]["exp_avg_sq"], parameter.detach())
        for name, parameter in model.named_parameters()
    }


def saved(folder, further):
    """Save a checkpoint as Megatron-LM does. Returns the model's logits, and Adam's state by parameter."""
    start(1, 1)
    given = arguments(**further)
    model = model_of(given)
    optimizer = optimizer_of(model, 3)
    _save(_content(model, optimizer, given), folder)
    return None if given.moe_grouped_gemm else logits_of(model), _moments(model, optimizer)


def loaded(path, folder, further, tensor_degree, pipeline_degree):
    """Load the iteration at ``path`` under other degrees, and save it again in ``folder``. Returns the logits of one rank."""
    from megatron.core import dist_checkpointing

    start(tensor_degree, pipeline_degree)
    given = arguments(tensor_model_parallel_size=tensor_degree, pipeline_model_parallel_size=pipeline_degree, **further)
    model = model_of(given)
    optimizer = optimizer_of(model, 1)
    found = dist_checkpointing.load(_content(model, optimizer, given), str(path), strict="raise_all")
    states = found.pop("optimizer")
    model.load_state_dict({name: value for name, value in found.items() if name in model.state_dict()})
    optimizer.load_state_dict(states)
    _save(_content(model, optimizer, given), folder)
    return logits_of(model) if tensor_degree * pipeline_degree == 1 else None
