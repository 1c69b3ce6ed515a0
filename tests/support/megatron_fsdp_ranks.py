"""Megatron-core's Megatron-FSDP on CPU ranks with gloo, and its checkpoints as Megatron-LM's checkpointing.py saves them.

Its wrapper, its buffers and the functions that turn its state into what torch.distributed.checkpoint saves are its own. It
asks for CUDA streams and for meshes of CUDA devices; there are none, and the meshes are the CPU's.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron_core_ranks import arguments, model_of, start
from megatron_core_training import without_cuda
from torch.distributed.device_mesh import DeviceMesh

ITERATION = 3
MOMENTS = ("exp_avg", "exp_avg_sq")
HYPERPARAMETERS = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "betas": (0.9, 0.95)}


@dataclass(frozen=True)
class Case:
    """Save in ``folder`` a model with ``parameters(tensor_rank, expert_rank)``: by state, whole parameters of the rank."""

    folder: Path
    parameters: object
    degrees: tuple[int, int] = (1, 1)  # tensor and expert parallel; the other ranks share each parameter
    step_in_groups: bool = True  # as Transformer Engine's Adam states it, not torch's
    further: dict = field(default_factory=dict)


def saved_by_fsdp(cases):
    """Save every case in one world. Returns for each how many elements of every parameter this rank has."""
    from megatron.core import parallel_state

    found = []
    for number, case in enumerate(cases):
        if number == 0:
            start(case.degrees[0], 1, case.degrees[1])
            without_cuda()
            on_the_cpu()
        else:
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(case.degrees[0], 1, expert_model_parallel_size=case.degrees[1])
        found.append(_saved(case))
    return found


def saved_by_torch_fsdp(folder, parameters):
    """Save a model under torch's FSDP 2 (--ckpt-format torch_dcp) with ``parameters`` as in a Case, and Adam after a step."""
    from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel
    from megatron.core.utils import unwrap_model

    start(1, 1)
    on_the_cpu()
    given = arguments(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    model, held = model_of(given), parameters(0, 0)["weight"]
    for name, parameter in model.named_parameters():
        parameter.data.copy_(held[name])
    model.config.transformer_impl = "local"
    wrapped = TorchFullyShardedDataParallel(model.config, DistributedDataParallelConfig(), model)
    inner = torch.optim.AdamW(wrapped.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    inner.step()
    content = {
        "args": given,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": unwrap_model(wrapped).state_dict_for_save_checkpoint(),
        "optimizer": inner.state_dict(),
        "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
    }
    _save(content, folder)


def on_the_cpu():
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter as adapter
    from torch.distributed.checkpoint import filesystem

    own = DeviceMesh.from_group

    def of_the_cpu(group, device_type, *args, **named):
        return own(group, "cpu", *args, **named)

    DeviceMesh.from_group = functools.wraps(own)(of_the_cpu)
    adapter.TELinear = type("TELinear", (), {})  # a mock without Transformer Engine
    adapter.FullyShardedDataParallel.sync_rng_states_across_tp_group = lambda _: None
    torch.cuda.Stream = lambda *_, **__: None
    torch.cuda.current_device = lambda: 0
    filesystem._write_item = getattr(filesystem._write_item, "__wrapped__", filesystem._write_item)  # as torch calls it


def _saved(case):
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    given = arguments(
        tensor_model_parallel_size=case.degrees[0],
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=case.degrees[1],
        **{"params_dtype": torch.bfloat16, **case.further},
    )
    wrapped = _wrapped(given)
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    held = case.parameters(*ranks)
    sizes = _fill(wrapped, held["weight"])
    optimizer = _optimizer(wrapped, held, case.step_in_groups)
    content = {
        "args": given,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": unwrap_model(wrapped).state_dict_for_save_checkpoint(),
        "optimizer": optimizer.sharded_state_dict({}, metadata={"distrib_optim_sharding_type": "fsdp_dtensor"}),
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 96},
        "rng_state": {f"(0, {ranks[0]})": [{"torch_rng_state": torch.get_rng_state()}]},
    }
    _save(_preprocessed(given, content, unwrap_model(wrapped)), case.folder)
    return sizes


def _wrapped(given):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.transformer.module import Float16Module

    model = model_of(given)
    model.config.bf16 = True
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy="optim_grads_params",
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    return FullyShardedDataParallel(
        model.config, config, Float16Module(model.config, model), device=torch.device("cpu")
    )


def _fill(wrapped, held):
    """Put this rank's part of every parameter into its fp32 master."""
    found = {}
    for name, parameter in wrapped.named_parameters():
        own = parameter.megatron_fsdp_slice
        parameter.detach()._local_tensor.view(-1).copy_(held[_inner(name)].reshape(-1)[own])
        found[_inner(name)] = own.stop - own.start
    assert set(found) == set(held)
    return found


def _inner(name):
    return name.removeprefix("module." * 3)


def _optimizer(wrapped, held, step_in_groups):
    """Megatron-core's distributed optimizer around Adam, with this rank's part of the moments."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    named = dict(wrapped.named_parameters())
    decay = [parameter for parameter in named.values() if len(parameter.shape) > 1]
    rest = [parameter for parameter in named.values() if len(parameter.shape) == 1]
    groups = [{"params": own, "wd_mult": mult} for own, mult in ((decay, 1.0), (rest, 0.0)) if own]
    inner = torch.optim.AdamW(groups, **HYPERPARAMETERS)
    for group in inner.param_groups:
        group |= {"step": ITERATION} if step_in_groups else {}
    for name, parameter in named.items():
        for state in MOMENTS:
            part = torch.zeros_like(parameter.detach())
            part._local_tensor.view(-1).copy_(held[state][_inner(name)].reshape(-1)[parameter.megatron_fsdp_slice])
            inner.state[parameter][state] = part
        if not step_in_groups:
            inner.state[parameter]["step"] = torch.tensor(float(ITERATION))
    made = DistributedOptimizer.__new__(DistributedOptimizer)  # its constructor asks for CUDA devices
    made.optimizer, made.ddp_config, made.model_chunks = inner, wrapped.ddp_config, [wrapped]
    made.is_stub_optimizer = False
    return made


def _preprocessed(given, content, model):
    """As preprocess_fsdp_dtensor_state_dict of Megatron-LM does it."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp import uneven_dtensor
    from megatron.core.transformer import fsdp_dtensor_checkpoint as own

    own.handle_fp8_extra_state_case(content["model"])
    if given.swiglu:
        found = own.handle_swiglu_in_state_dict(model, content["model"], content["optimizer"])
        if found is not None:  # before 0.16, it changes its arguments
            content["model"], content["optimizer"] = found
    if given.num_experts:
        content["model"] = own.handle_experts_in_state_dict(content["model"], given.num_experts)
    return uneven_dtensor.preprocess_state_dict_for_uneven_dtensor(content)


def _save(content, folder):
    from torch.distributed import checkpoint

    path = Path(folder) / f"iter_{ITERATION:07d}"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    dist.barrier()
    checkpoint.save(content, storage_writer=checkpoint.FileSystemWriter(path))
