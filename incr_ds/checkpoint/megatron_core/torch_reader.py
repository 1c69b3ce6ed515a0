"""Megatron-LM's older checkpoints (--ckpt-format torch) of any tensor- and pipeline-parallel degree, as logical checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.assembly import Assembled, assemble_parameters, check_copies, read_assembled
from incr_ds.checkpoint.base import STATES, CheckpointFacts, Counters, State, rounds_to, row_portions
from incr_ds.checkpoint.megatron_core.common import arguments, one_step, optimizer_groups
from incr_ds.checkpoint.megatron_core.configuration import chosen_architecture
from incr_ds.checkpoint.megatron_core.keys import known_names
from incr_ds.checkpoint.megatron_core.rank_files import EMBEDDING, HEAD, RankFile, open_rank_files
from incr_ds.checkpoint.megatron_core.rank_optimizer import RankOptimizer, UnreadableStateError, rank_optimizer
from incr_ds.checkpoint.torch_file.extents import FileTensor
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds, RankParameter
from incr_ds.sharding.megatron_modules import (
    MEGATRON_CORE,
    check_modules,
    module_parameters,
    modules_of,
    padding_notes,
)

KIND = "Megatron-LM torch"
_CHECKED_ELEMENTS = 1 << 18  # compared at once


@dataclass(frozen=True)
class _Shards:
    """The parameters of one rank, in each state."""

    states: Mapping[State, Mapping[str, FileTensor]]

    def read(self, name: str, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of a parameter."""
        return self.states[state][name].rows(first, stop)


@dataclass(frozen=True)
class _Rank:
    """A holder of parameters."""

    index: int
    model_file: Path
    shards: _Shards


class MegatronTorchCheckpoint:
    """An iteration's folder with one file for each model-parallel rank. Only names, shapes and arguments are read at first."""

    def __init__(self, folder: Path, config: Path | None) -> None:
        self._folder = folder
        self._files, self._degrees = open_rank_files(folder)
        first = self._files[0]
        if EMBEDDING not in first.parameters or len(first.parameters[EMBEDDING].shape) != 2:
            raise CheckpointError(
                f"{first.path}: no matrix {EMBEDDING}; only models of the class GPTModel can be read."
            )
        rows = first.parameters[EMBEDDING].shape[0] * self._degrees[0]
        given = arguments(first.content)
        self.architecture = chosen_architecture(folder, config, given, rows, first.path)
        check_modules(modules_of(MEGATRON_CORE), self.architecture, self._degrees[0], str(folder))
        optimizers, no_moments = _optimizers(self._files, HEAD if self.architecture.tied else None)
        self._ranks = [
            _Rank(number, file.path, _Shards(optimizers[number].states if optimizers else {"weight": file.parameters}))
            for number, file in enumerate(self._files)
        ]
        self._tensors = self._assembled(rows)
        self.facts = self._collect_facts(given, rows, optimizers, no_moments)

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor: the optimizer's fp32 masters if it has them, and its moments."""
        return read_assembled(self, self._tensors, name, state, bounds)

    def self_check(self) -> Iterator[str]:
        """Check that masters round to the weights, and that copies on several ranks are equal. Yields tensors' names.

        A wrong order of the optimizer's parameters would show as masters that do not round to the weights.
        """
        for file, rank in zip(self._files, self._ranks, strict=True):
            for name, saved in file.parameters.items():
                _check_master(file, rank, name, saved)
        for name, tensor in self._tensors.items():
            for _ in check_copies(tensor, self.facts.states):
                pass
            yield name

    def _assembled(self, rows: int) -> Mapping[str, Assembled]:
        vocabulary = max(rows, self.architecture.sizes["vocab"])
        declared = [
            _declared(self.architecture, self._degrees[0], rank, vocabulary) for rank in range(self._degrees[0])
        ]
        described = [
            (rank, {name: tensor.shape for name, tensor in file.parameters.items()}, declared[file.tensor_rank])
            for file, rank in zip(self._files, self._ranks, strict=True)
        ]
        return assemble_parameters(self._folder, described, self.architecture)

    def _collect_facts(
        self,
        given: Mapping[str, object],
        rows: int,
        optimizers: Sequence[RankOptimizer],
        no_moments: str | None,
    ) -> CheckpointFacts:
        first, (tensor, pipeline) = self._files[0], self._degrees
        iterations = sorted({str(file.content.get("iteration"))[:20] for file in self._files})
        if len(iterations) != 1:
            raise CheckpointError(
                f"{self._folder}: the ranks' files have the iterations {iterations}: they come from different checkpoints."
            )
        iteration, samples = first.content.get("iteration"), given.get("consumed_train_samples")
        stages = tuple(file.num_layers for file in self._files[::tensor])
        return CheckpointFacts(
            self._folder,
            KIND,
            STATES if optimizers else ("weight",),
            one_step({step for optimizer in optimizers for step in optimizer.steps}, self._folder)
            if optimizers
            else None,
            tuple(sorted(path for file in self._files for path in file.path.parent.glob("*.pt"))),
            {"tensor_parallel": tensor, "pipeline_parallel": pipeline},
            no_moments,
            dtype=str(first.parameters[EMBEDDING].dtype).removeprefix("torch."),
            optimizer_groups=optimizer_groups(first.content.get("optimizer")) if optimizers else (),
            notes=padding_notes(self.architecture, rows),
            recorded=Counters(
                global_steps=iteration if isinstance(iteration, int) else None,
                global_samples=samples if isinstance(samples, int) else None,
            ),
            stages=stages if pipeline > 1 else (),
        )


def _optimizers(files: Sequence[RankFile], shared: str | None) -> tuple[list[RankOptimizer], str | None]:
    """The optimizer of each rank, or no optimizers and the reason."""
    found = []
    for file in files:
        try:
            found.append(rank_optimizer(file, shared))
        except UnreadableStateError as error:
            return [], str(error)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle raises many kinds of errors
            raise CheckpointError(
                f"{file.path}: optimizer: not what Megatron-LM writes there ({type(error).__name__}). Copy the file again, or "
                "use another iteration."
            ) from error
    return found, None


def _declared(
    architecture: Architecture, tensor_parallel: int, rank: int, vocabulary: int
) -> Mapping[str, RankParameter]:
    """What each parameter of a tensor rank holds, by all names that it may have."""
    modules = modules_of(MEGATRON_CORE)
    found: dict[str, RankParameter] = {}
    for layer, parameters in module_parameters(modules, architecture, tensor_parallel, rank, vocabulary).items():
        for parameter in parameters:
            within = parameter.tensor.layer is not None
            prefix = f"decoder.layers.{layer - modules.first_decoder}." if within else ""
            for name in known_names(parameter):
                found[prefix + name.format(expert=parameter.tensor.expert)] = parameter
    if architecture.tied:  # the last stage of a pipeline has a copy of the embedding
        found[HEAD] = found[EMBEDDING]
    return found


def _check_master(file: RankFile, rank: _Rank, name: str, saved: FileTensor) -> None:
    master = rank.shards.states["weight"][name]
    if master == saved:
        return
    for ((first, stop),) in row_portions(saved.shape, _CHECKED_ELEMENTS):
        if not rounds_to(master.rows(first, stop), saved.rows(first, stop)):
            raise CheckpointError(
                f"{file.path}: {name}: the fp32 master in {master.path.name} does not round to the saved weight (rows {first} "
                f"to {stop}). The optimizer's parameters are in another order, or files were swapped or damaged."
            )
