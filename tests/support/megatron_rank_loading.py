"""Megatron-core's own models, optimizers and scheduler on CPU ranks, which load the format torch as Megatron-LM does."""

from dataclasses import dataclass, field
from pathlib import Path

import megatron_core_ranks
import torch
from megatron_core_ranks import arguments, logits_of
from megatron_core_training import built, in_one_world, one_step
from megatron_rank_training import save


@dataclass(frozen=True)
class Case:
    """Load ``source`` (an iteration's folder), train ``steps`` steps, and save in ``folder``."""

    source: Path
    folder: Path
    degrees: tuple[int, int]
    further: dict = field(default_factory=dict)
    steps: int = 0
    vocabulary: int = megatron_core_ranks.VOCABULARY


def loaded_by_ranks(cases):
    """Run every case in one world. Returns for each the logits, and the rate of the scheduler after what was loaded."""
    return in_one_world(cases, _run)


def _run(case):
    from megatron.core import parallel_state

    megatron_core_ranks.VOCABULARY = case.vocabulary
    given = arguments(
        tensor_model_parallel_size=case.degrees[0],
        pipeline_model_parallel_size=case.degrees[1],
        **{"use_distributed_optimizer": False, **case.further},
    )
    model, optimizer, scheduler = built(given, given.use_distributed_optimizer)
    one_step(model, optimizer, scheduler, 9)  # which allocates the optimizer's state, and must leave no trace
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if case.degrees[1] > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    content = torch.load(case.source / name / "model_optim_rng.pt", weights_only=False)
    model.load_state_dict(content["model"], strict=True)
    if case.source.name == "release":  # Megatron-LM asks such a folder for the model alone
        optimizer.reload_model_params()
    else:
        _load_optimizer(optimizer, content["optimizer"], case.source / name / "distrib_optim.pt")
        scheduler.load_state_dict(content["opt_param_scheduler"])
    for step in range(case.steps):
        one_step(model, optimizer, scheduler, step)
    save(case.folder, given, model, optimizer, scheduler)
    computes = case.degrees[1] == 1 and (given.num_experts is None or case.degrees[0] == 1)
    return logits_of(model).float() if computes else None


def _load_optimizer(optimizer, content, buffers):
    inner = content.get("optimizer", content)
    for own in inner.get("state", {}).values():
        # torch's AdamW expects the step among the states. The fused ones have it in their groups alone.
        own.setdefault("step", torch.tensor(float(inner["param_groups"][0].get("step", 0))))
    optimizer.load_state_dict(content)
    if buffers.is_file():
        with torch.no_grad():  # in fp32 the masters are parts of the model's parameters
            optimizer.load_parameter_state(str(buffers))
    for chained in optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            group.pop("step", None)  # which torch's AdamW does not count up
        for own in chained.optimizer.state.values():
            own["step"] = own["step"].clone()
