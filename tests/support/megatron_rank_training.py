"""Checkpoints in Megatron-LM's format torch, laid out as its training/checkpointing.py lays them out.

The content comes from Megatron-core's own GPTModel, optimizers and scheduler on CPU ranks with gloo.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron_core_ranks import arguments, logits_of, start
from megatron_core_training import built, one_step, with_torch_adam, without_cuda

ITERATION = 3


def saved_by_ranks(cases):
    """Train and save each case (folder, degrees, arguments) in one world.

    Returns for each the tensor rank and the stage of this rank, its logits, and its weights, masters and moments.
    """
    from megatron.core import parallel_state

    found = []
    for number, (folder, degrees, further) in enumerate(cases):
        if number == 0:
            start(*degrees)
            without_cuda()
            with_torch_adam()
        else:
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(*degrees)
        found.append(_trained(Path(folder), degrees, further))
    return found


def _trained(folder, degrees, further):
    from megatron.core import parallel_state

    given = arguments(
        tensor_model_parallel_size=degrees[0],
        pipeline_model_parallel_size=degrees[1],
        **{"use_distributed_optimizer": False, **further},
    )
    model, optimizer, scheduler = built(given, given.use_distributed_optimizer)
    for step in range(2):
        one_step(model, optimizer, scheduler, step)
    save(folder, given, model, optimizer, scheduler)
    place = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    return place, logits_of(model).float() if degrees[1] == 1 else None, _states(model, optimizer)


def save(folder, given, model, optimizer, scheduler):
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if given.pipeline_model_parallel_size > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    inner = folder / f"iter_{ITERATION:07d}" / name
    inner.mkdir(parents=True, exist_ok=True)
    if given.use_distributed_optimizer:
        optimizer.save_parameter_state(str(inner / "distrib_optim.pt"))  # every data-parallel rank takes part
    if parallel_state.get_data_parallel_rank() == 0:
        content = {
            "args": given,
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "model": model.state_dict_for_save_checkpoint(),
            "optimizer": optimizer.state_dict(),
            "opt_param_scheduler": scheduler.state_dict(),
            "rng_state": [
                {
                    "random_rng_state": random.getstate(),
                    "np_rng_state": np.random.get_state(),
                    "torch_rng_state": torch.get_rng_state(),
                    "rng_tracker_states": {},
                }
            ],
            "num_floating_point_operations_so_far": 0,
        }
        torch.save(content, inner / "model_optim_rng.pt")
    if dist.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    dist.barrier()


def _states(model, optimizer):
    """This rank's weights, and Adam's masters and moments where it has them whole; a distributed optimizer has pieces."""
    inner = optimizer.chained_optimizers[0].optimizer.state
    found = {}
    for name, parameter in model.named_parameters():
        own = inner.get(getattr(parameter, "main_param", parameter), {})
        found[name] = {"saved": parameter.detach().clone()}
        if own and own["exp_avg"].shape == parameter.shape:
            master = getattr(parameter, "main_param", parameter).detach()
            found[name] |= {"weight": master, "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}
    return found
