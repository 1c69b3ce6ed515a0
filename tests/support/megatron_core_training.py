"""Megatron-core's own training on CPU ranks: its DistributedDataParallel, its optimizers and scheduler, and its checkpoints
as Megatron-LM loads and saves them.

Their constructors put a few numbers on a CUDA device, and ask parameters for the name of a CUDA type; both are the CPU's here.
"""

import functools
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from megatron_core_ranks import SIZES, arguments, logits_of, model_of, start
from packaging.version import Version

RELEASE = Version(version("megatron-core"))
RESHARDABLE = RELEASE >= Version("0.15")  # has fully_reshardable; before, this was what a run could reshard:
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable" if RESHARDABLE else "fully_sharded_model_space",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_STATES_METADATA = RELEASE >= Version("0.13")
MODULES = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
MLP, IN_MIXTURES = ("mlp.linear_fc1", "mlp.linear_fc2"), ("pre_mlp_layernorm",)


@dataclass(frozen=True)
class Case:
    """Load ``source`` (an iteration's folder; None: start anew), train ``steps`` steps, and save in ``folder``."""

    source: Path | None
    folder: Path
    steps: int = 0
    degrees: tuple[int, ...] = (1, 1)  # tensor, pipeline and, in a mixture, expert parallel
    distributed: bool = True
    further: dict = field(default_factory=dict)


def without_cuda():
    def on_the_cpu(made):
        return functools.wraps(made)(lambda *args, device=None, **named: made(*args, **named))

    own = torch.Tensor.type
    torch.tensor, torch.zeros = on_the_cpu(torch.tensor), on_the_cpu(torch.zeros)
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Parameter.type = lambda self: own(self).replace("torch.", "torch.cuda.")
    from megatron.core.optimizer import distrib_optimizer

    if hasattr(distrib_optimizer, "quantize_param_shard"):  # 0.12 needs Transformer Engine even for no parameter
        distrib_optimizer.quantize_param_shard = lambda *_: None


def with_torch_adam():
    """torch's AdamW has its step among the states of a parameter, unlike the fused ones, for which this method was written."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    own = DistributedOptimizer._set_main_param_and_optimizer_states

    def setting(self, parameter, tensors):
        held = self._get_main_param_and_optimizer_states(parameter)
        own(self, parameter, {**tensors, "step": held["step"]})

    DistributedOptimizer._set_main_param_and_optimizer_states = setting


def trained(cases):
    """Run every case in one world.

    Returns for each the logits, the keys that nobody asked for, and those that the folder lacked.
    """
    return in_one_world(cases, _run)


def in_one_world(cases, run):
    """What ``run`` returns for each case, whose degrees may differ. Starting the ranks takes longer than most cases."""
    from megatron.core import parallel_state

    found = []
    for number, case in enumerate(cases):
        if number == 0:
            start(*case.degrees)
            without_cuda()
            with_torch_adam()
        else:
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(
                *case.degrees[:2], expert_model_parallel_size=(*case.degrees, 1)[2]
            )
        found.append(run(case))
    return found


def _run(case):
    given = arguments(
        tensor_model_parallel_size=case.degrees[0], pipeline_model_parallel_size=case.degrees[1], **case.further
    )
    model, optimizer, scheduler = built(given, case.distributed)
    one_step(model, optimizer, scheduler, 0)  # torch's optimizer allocates its state
    keys = _loaded(model, optimizer, scheduler, given, case.source) if case.source is not None else None
    for step in range(1, case.steps + 1):
        one_step(model, optimizer, scheduler, step)
    _save(model, optimizer, scheduler, given, case.folder)
    # Over tensor ranks, a mixture needs a cut sequence.
    computes = case.degrees[1] == 1 and (given.num_experts is None or case.degrees[0] == 1)
    return logits_of(model).float() if computes else None, keys


def built(given, distributed):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    model = model_of(given).to(given.params_dtype)
    in_fp32 = getattr(given, "accumulate_allreduce_grads_in_fp32", False)
    gradients = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=in_fp32)
    wrapped = DistributedDataParallel(model.config, gradients, model)
    config = OptimizerConfig(
        lr=1e-3,
        min_lr=1e-3,
        weight_decay=0.1,
        clip_grad=0.0,
        bf16=given.params_dtype == torch.bfloat16,
        params_dtype=given.params_dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-3,
        lr_warmup_steps=0,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1000,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return model, optimizer, scheduler


def one_step(model, optimizer, scheduler, step):
    """A step with gradients that are sines, equal on all data-parallel ranks."""
    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.sin(torch.arange(parameter.numel()).view_as(parameter) + float(step)))
    assert optimizer.step()[0]
    scheduler.step(increment=32)


def _content(model, optimizer, scheduler, given, metadata, *, is_loading=False):
    content = {"model": model.sharded_state_dict(metadata=dict(metadata))}
    stated = {"metadata": dict(metadata)} if _STATES_METADATA else {}
    content["optimizer"] = optimizer.sharded_state_dict(content, is_loading=is_loading, **stated)
    return {**content, "opt_param_scheduler": scheduler.state_dict(), "args": given, "iteration": 3}


def _extra_states(model, content):
    """What Transformer Engine's modules would ask for beside what local modules do."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    asked = {value.key for value in content["model"].values()}
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    experts = model.config.num_moe_experts
    keys = [(f"decoder.layers.{name}._extra_state", (i,)) for name in MODULES for i in layers]
    keys += [
        (f"decoder.layers.{name}._extra_state", (i,)) for name in (IN_MIXTURES if experts else MLP) for i in layers
    ]
    keys += [
        (f"decoder.layers.mlp.experts.experts.{name}._extra_state", (i, expert))
        for name in ("linear_fc1", "linear_fc2")
        for i in layers
        for expert in range(experts or 0)
    ]
    counts = (SIZES["num_layers"], experts)
    found = {
        str(key): ShardedObject(key[0], None, counts[: len(key[1])], key[1], _replica())
        for key in keys
        if key[0] not in asked
    }
    last = "decoder.final_layernorm._extra_state"
    return {**found, **({last: ShardedObject(last, None, (1,), (0,), _replica())} if model.post_process else {})}


def _replica():
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    return (0, *ranks)


def _loaded(model, optimizer, scheduler, given, path):
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(path))
    assert vars(common["args"])["num_layers"] == SIZES["num_layers"]
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) if _STATES_METADATA else METADATA
    content = _content(model, optimizer, scheduler, given, metadata, is_loading=True)
    extra = {} if "no_save_rng" not in vars(common["args"]) else {"extra": _extra_states(model, content)}
    if path.name == "release":  # Megatron-LM asks such a folder for the model alone
        content = {"model": content["model"]}
    found, missing, unexpected = dist_checkpointing.load({**content, **extra}, str(path), strict="return_all")
    model.load_state_dict(found["model"])
    if "optimizer" not in content:
        optimizer.reload_model_params()
        return missing, unexpected
    outer = found["optimizer"]
    each = [outer[number] for number in sorted(outer)] if 0 in outer else [outer]  # chained ones are numbered
    # That of the optimizer without masters has no inner one.
    for held in (held for one in each for held in (one, one.get("optimizer", {}))):
        state = held.get("state", {})
        if state and "common_step" not in state:
            # torch's AdamW expects the step among the states. The fused ones have it in their groups alone.
            state["common_step"] = torch.tensor(float(held["param_groups"][0]["step"]))
    optimizer.load_state_dict(found["optimizer"])
    for inner in (chained.optimizer for chained in optimizer.chained_optimizers):
        for group in inner.param_groups:
            group.pop("step", None)  # which torch's AdamW does not count up
        for own in inner.state.values():
            own["step"] = own["step"].clone()  # loaded as one tensor, which every parameter would then count up
    scheduler.load_state_dict(found["opt_param_scheduler"])
    assert set(found.get("extra", {}).values()) <= {None}
    return missing, unexpected


def _save(model, optimizer, scheduler, given, folder):
    from megatron.core import dist_checkpointing

    path = Path(folder) / "iter_0000003"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    content = _content(model, optimizer, scheduler, given, METADATA)
    dist_checkpointing.save(content, str(path), **({"content_metadata": METADATA} if _STATES_METADATA else {}))
