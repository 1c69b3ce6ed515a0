"""Checkpoints in the formats fsdp_dtensor and torch_dcp, which torch.distributed.checkpoint itself writes, without ranks."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch_dist_folders import STATES, arguments_of, parameters_of

GROUP = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "betas": (0.9, 0.95), "wd_mult": 1.0}
WRAPPED = "module.module.module."


def by_parameter(source, state):
    """Every layer's parameters by their names in the model, gate and up apart, as Megatron-FSDP's preprocessing leaves them."""
    found = {}
    for key, tensor in parameters_of(source, state).items():
        named = {key: tensor}
        if "decoder.layers." in key:
            inner = key.removeprefix("decoder.layers.")
            named = {f"decoder.layers.{layer}.{inner}": own for layer, own in enumerate(tensor)}
        for name, own in named.items():
            halves = own.chunk(2) if "linear_fc1.weight" in name else (own,)
            found |= {
                f"{name}{end}": half for end, half in zip(("_w", "_v") if halves[1:] else ("",), halves, strict=True)
            }
    return {name: tensor.clone() for name, tensor in found.items()}


def content_of(source, step_in_groups=True, wrapped=WRAPPED, **further):
    """The state dict of a Megatron-FSDP run, as torch.distributed.checkpoint takes it."""
    held, step = {state: by_parameter(source, state) for state in STATES}, source.facts.step
    states = {
        f"{wrapped}{name}": {state: held[state][name] for state in STATES[1:]}
        | ({} if step_in_groups else {"step": torch.tensor(float(step))})
        for name in held["weight"]
    }
    group = GROUP | ({"step": step} if step_in_groups else {})
    return {
        "args": arguments_of(source.architecture, vocab_size=None, **further),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {f"module.{name}": tensor for name, tensor in held["weight"].items()},
        "optimizer": {
            "state": states,
            "param_to_group_meta": {name.removesuffix("_w").removesuffix("_v"): group for name in states},
        },
        "rng_state": {"(0, 0)": [{"torch_rng_state": torch.get_rng_state()}]},
        "opt_param_scheduler": {"max_lr": 1e-3},
    }


def write(folder: Path, content):
    inner = folder / "iter_0000007"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(content, checkpoint_id=inner, no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    return inner


def joined(model):
    """The model's tensors as torch_dcp has them: gate and up are one."""
    found = {}
    for name, tensor in model.items():
        whole = name.removesuffix("_w").removesuffix("_v")
        found[whole] = torch.cat([found[whole], tensor]) if whole in found else tensor
    return found


def content_of_torch_dcp(source):
    """The state dict of a run with torch's FSDP: the weights by their names, the moments by numbers."""
    content = content_of(source)
    return content | {
        "model": joined(by_parameter(source, "weight")),
        "optimizer": {"state": {"0": {"exp_avg": torch.ones(4)}}},
    }
