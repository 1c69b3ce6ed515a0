"""Finds masters and moments of each parameter in the optimizer's state of one rank, in Megatron-LM's format torch.

Three optimizers store them in three ways: FP32Optimizer by the parameter's number, Float16OptimizerWithFloat16Params too, with
the masters in lists of their own, and DistributedOptimizer in buffers (distrib_optim.pt). None of them names a parameter. The
numbers and the order in the buffers follow from the order of the model's parameters. Facts: megatron-core 0.12 to 0.19
(optimizer/, distributed/param_and_grad_buffer.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from incr_ds.checkpoint.base import STATES, State
from incr_ds.checkpoint.megatron_core.rank_files import DISTRIBUTED_FILE, RankFile
from incr_ds.checkpoint.torch_file.extents import FileTensor, content_with_extents, numbers
from incr_ds.sharding.megatron_ranks import ALIGNED, buffer_starts, decays

_MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
IN_BUFFER: Mapping[State, str] = {"weight": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


class UnreadableStateError(Exception):
    """Why the optimizer's state cannot be read. The weights can."""


@dataclass(frozen=True)
class RankOptimizer:
    """The optimizer's state of one rank: masters and moments by parameter, and the steps that it states."""

    states: Mapping[State, Mapping[str, FileTensor]]
    steps: frozenset[int]


def rank_optimizer(rank: RankFile, shared: str | None) -> RankOptimizer:
    """The optimizer's state in a rank's files. Raises UnreadableStateError if there is none, or if its order is not certain.

    ``shared`` is the name of the last stage's copy of a tied embedding.
    """
    saved = rank.content.get("optimizer")
    if saved is None:
        raise UnreadableStateError("it was saved without the optimizer")
    if not isinstance(saved, dict):
        raise UnreadableStateError("it has several optimizers, which only mixtures and models in parts have")
    inner = saved.get("optimizer", saved)
    groups, states = inner.get("param_groups"), inner.get("state")
    if not isinstance(groups, list):
        raise UnreadableStateError("its optimizer has no param_groups")
    if states is None:
        return RankOptimizer(_from_buffer(rank, shared), _steps(group.get("step") for group in groups))
    numbered = _numbered(rank, groups)
    found: dict[State, dict[str, FileTensor]] = {
        state: {name: _moment(states.get(number), state, name) for number, name in numbered.items()}
        for state in STATES[1:]
    }
    masters = next((saved[key] for key in _MASTERS if key in saved), None)
    found["weight"] = dict(rank.parameters) if masters is None else _masters(groups, masters, numbered)
    _check_shapes(rank, found)
    stated = [group.get("step") for group in groups] + [state.get("step") for state in states.values()]
    return RankOptimizer(found, _steps(iter(stated)))


def _steps(stated: Iterator[Any]) -> frozenset[int]:
    return frozenset(int(step) for step in numbers(stated))


def _numbered(rank: RankFile, groups: Sequence[Mapping[str, Any]]) -> Mapping[int, str]:
    """The parameter of each number. Matrices and vectors have groups of their own, in the order of the modules."""
    names = {
        kind: [name for name, tensor in rank.parameters.items() if decays(name, tensor.shape) == kind]
        for kind in (True, False)
    }
    found: dict[int, str] = {}
    for group in groups:
        own = group.get("params") or []
        members = names.pop(group.get("wd_mult") != 0.0, []) if own else []
        if len(members) != len(own):
            raise UnreadableStateError(
                f"a parameter group has {len(own)} parameters, and {len(members)} are expected: one group of matrices and "
                "one of norms and biases, for all parameters of the model"
            )
        found |= dict(zip(own, members, strict=True))
    if len(found) != len(rank.parameters):
        raise UnreadableStateError(
            f"its parameter groups have {len(found)} of {len(rank.parameters)} parameters; were some frozen?"
        )
    return found


def _moment(state: Any, moment: State, name: str) -> FileTensor:
    found = state.get(moment) if isinstance(state, dict) else None
    if not isinstance(found, FileTensor):
        raise UnreadableStateError(f"the optimizer's state of {name} has no {moment}, which Adam has")
    return found


def _masters(groups: Sequence[Mapping[str, Any]], masters: Any, numbered: Mapping[int, str]) -> dict[str, FileTensor]:
    own = [number for group in groups for number in group.get("params") or []]
    tensors = [tensor for group in masters for tensor in group]
    if len(tensors) != len(own) or not all(isinstance(tensor, FileTensor) for tensor in tensors):
        raise UnreadableStateError(
            f"it has {len(tensors)} fp32 masters of {len(own)} parameters; some parameters are in fp32 themselves"
        )
    return {numbered[number]: tensor for number, tensor in zip(own, tensors, strict=True)}


def _check_shapes(rank: RankFile, found: Mapping[State, Mapping[str, FileTensor]]) -> None:
    for state, tensors in found.items():
        for name, tensor in tensors.items():
            if tensor.shape != rank.parameters[name].shape:
                raise UnreadableStateError(
                    f"the {state} that {name} would have is of shape {list(tensor.shape)}, and the parameter of shape "
                    f"{list(rank.parameters[name].shape)}: the order of the parameters is another one"
                )


def _from_buffer(rank: RankFile, shared: str | None) -> Mapping[State, Mapping[str, FileTensor]]:
    path = rank.path.with_name(DISTRIBUTED_FILE)
    if not path.is_file():
        raise UnreadableStateError(f"{path.parent.name}/{DISTRIBUTED_FILE} is missing")
    content = content_with_extents(path)
    if not isinstance(content, dict) or content.get("buckets_coalesced") is not True:
        raise UnreadableStateError(f"{DISTRIBUTED_FILE} stores buckets one by one, as Megatron-core before 0.7 did")
    buffers = [buffer for held in content.values() if isinstance(held, dict) for buffer in held.values()]
    if len(buffers) != 1 or not isinstance(buffers[0], dict):
        raise UnreadableStateError(f"{DISTRIBUTED_FILE} has {len(buffers)} buffers; models of one dtype have one")
    tensors = {state: buffers[0].get(key) for state, key in IN_BUFFER.items()}
    sizes = {tensor.numel for tensor in tensors.values() if isinstance(tensor, FileTensor)}
    if len(sizes) != 1 or not all(isinstance(tensor, FileTensor) for tensor in tensors.values()):
        raise UnreadableStateError(f"{DISTRIBUTED_FILE} lacks {', '.join(IN_BUFFER.values())} of one size")
    starts = _starts(rank, sizes.pop(), shared)
    return {
        state: {name: tensor.part(starts[name], rank.parameters[name].shape) for name in rank.parameters}
        for state, tensor in tensors.items()
        if isinstance(tensor, FileTensor)
    }


def _starts(rank: RankFile, total: int, shared: str | None) -> Mapping[str, int]:
    """Where each parameter starts in a buffer of ``total`` elements, each start padded or none.

    Starts are padded within a bucket, and the sizes of buckets are not stated. So the buffer's size must be that with all
    paddings or that with none.
    """
    sizes = {name: tensor.numel for name, tensor in rank.parameters.items()}
    for unit, alone in ((ALIGNED, shared), (ALIGNED, None), (1, None)):
        starts, end = buffer_starts(sizes, unit, alone)
        if end == total:
            return starts
    raise UnreadableStateError(
        f"{DISTRIBUTED_FILE} has {total} elements, and the parameters fill {end} without padding: several buckets hold "
        f"parameters whose sizes are no multiples of {ALIGNED}, or not all parameters were trained"
    )
