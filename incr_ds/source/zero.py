"""DeepSpeed ZeRO checkpoints (stages 1, 2 and 3; any data, tensor and pipeline degree) as logical checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.logical import STATES, CheckpointFacts, State, check_shapes
from incr_ds.errors import CheckpointError
from incr_ds.source.checks import (
    check_duplicates,
    check_exported,
    check_master,
    check_padding,
    exported_weights,
    module_weights,
)
from incr_ds.source.partitions import ModelRank, open_rank, rank_files

_METADATA = ("global_steps", "global_samples", "skipped_steps", "ds_version")


@dataclass(frozen=True)
class _Joined:
    """A logical tensor as parts (rank, parameter name there), joined along ``dimension`` in tensor-parallel order."""

    parts: tuple[tuple[ModelRank, str], ...]
    dimension: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [rank.shards.parameters[parameter].shape for rank, parameter in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        whole = list(self.shapes[0])
        whole[self.dimension] = sum(shape[self.dimension] for shape in self.shapes)
        return tuple(whole)

    def read(self, state: State, first: int, stop: int) -> torch.Tensor:
        """Rows [first, stop) of the whole."""
        found, position = [], 0
        for (rank, parameter), shape in zip(self.parts, self.shapes, strict=True):
            begin, end = first, stop
            if self.dimension == 0:
                begin, end = max(first - position, 0), min(stop - position, shape[0])
                position += shape[0]
            if begin < end:
                found.append(rank.shards.read(parameter, state, begin, end))
        return found[0] if len(found) == 1 else torch.cat(found, dim=self.dimension)


class ZeroCheckpoint:
    """A DeepSpeed checkpoint folder and tag; nothing but metadata is read before ``read``."""

    def __init__(self, folder: Path, tag: str, architecture: Architecture, *, trust: bool = False) -> None:
        self._folder = folder / tag
        self._architecture = architecture
        self._ranks = [open_rank(paths, architecture, trust) for paths in rank_files(self._folder)]
        self._tensor_parallel, self._pipeline_parallel = _model_degrees(self._folder, self._ranks)
        self._joined = self._assemble()
        check_shapes(architecture, {name: joined.shape for name, joined in self._joined.items()}, str(self._folder))
        self._facts = self._collect_facts()

    @property
    def facts(self) -> CheckpointFacts:
        """What is known without reading a tensor."""
        return self._facts

    @property
    def architecture(self) -> Architecture:
        """The model that the checkpoint holds."""
        return self._architecture

    def read(self, name: str, state: State = "weight", rows: slice | None = None) -> torch.Tensor:
        """Rows of one tensor (fp32 masters and moments), joined over tensor-parallel ranks."""
        spec = self._architecture.by_name[name]
        first, stop, _ = (rows or slice(None)).indices(spec.shape[0])
        return self._joined[spec.tied_to or name].read(state, first, stop)

    def self_check(self) -> Iterator[str]:
        """Prove that the shards belong together, yielding the name of each parameter checked.

        Stages 1 and 2: the fp32 master cast to the model's dtype equals the saved module weight bit for bit. Stage 3
        saves no module weights: there the zero padding must be zero and no two ranks may hold the same bytes. Weights
        that transformers' Trainer exported beside the tag must be the masters too. Raises CheckpointError naming the
        first tensor that does not fit.
        """
        exported = exported_weights(self._folder.parent, self._architecture)
        for rank in self._ranks:
            check_padding(rank)
            check_duplicates(rank)
            modules = module_weights(self._folder, rank)
            for parameter, logical in rank.names.items():
                if parameter in modules:
                    check_master(rank, parameter, modules[parameter])
                if exported is not None:
                    check_exported(self, exported, logical)
                yield logical

    def _assemble(self) -> dict[str, _Joined]:
        parts: dict[str, list[tuple[ModelRank, str]]] = {}
        stages: dict[str, int] = {}
        for rank in self._ranks:
            stage = rank.index // self._tensor_parallel
            for parameter, logical in rank.names.items():
                if stages.setdefault(logical, stage) == stage:
                    parts.setdefault(logical, []).append((rank, parameter))
        return {logical: self._join(logical, found) for logical, found in parts.items()}

    def _join(self, logical: str, parts: list[tuple[ModelRank, str]]) -> _Joined:
        rank, parameter = parts[0]
        local = rank.shards.parameters[parameter].shape
        whole = self._architecture.by_name[logical].shape if logical in self._architecture.by_name else local
        if local == whole or len(local) != len(whole):
            return _Joined((parts[0],), 0)
        cut = [dimension for dimension, size in enumerate(local) if size != whole[dimension]]
        return _Joined(tuple(parts), cut[0])

    def _collect_facts(self) -> CheckpointFacts:
        first = self._ranks[0]
        for rank in self._ranks[1:]:
            if (rank.step, rank.stage) != (first.step, first.stage):
                raise CheckpointError(
                    f"{rank.files[0]}: step {rank.step}, ZeRO stage {rank.stage}; {first.files[0]} says step "
                    f"{first.step}, stage {first.stage}. The files come from different checkpoints."
                )
        layout = {
            "tensor_parallel": self._tensor_parallel,
            "pipeline_parallel": self._pipeline_parallel,
            "data_parallel": len(first.files),
            "zero_stage": first.stage,
        }
        files = tuple(sorted(path for path in self._folder.iterdir() if path.suffix == ".pt"))
        metadata = {key: first.model[key] for key in _METADATA if key in first.model}
        metadata["dtype"] = "bfloat16" if first.files[0].name.startswith("bf16_") else "float32"
        metadata["optimizer_groups"] = first.hyperparameters
        kind = f"DeepSpeed ZeRO-{first.stage}" if first.has_stage else "DeepSpeed BF16_Optimizer"
        return CheckpointFacts(self._folder, kind, STATES, first.step, layout, metadata, files)


def _model_degrees(folder: Path, ranks: Sequence[ModelRank]) -> tuple[int, int]:
    degrees = ranks[0].model.get("checkpoint_parallel_dimensions") or {}
    has_layers = any(folder.glob("layer_*-model_*-model_states.pt"))
    first_layer = len(list(folder.glob("layer_00-model_*-model_states.pt")))
    tensor = degrees.get("tp_degree") or (first_layer if has_layers else len(ranks))
    if not tensor or len(ranks) % tensor:
        raise CheckpointError(
            f"{folder}: {len(ranks)} model-parallel ranks do not divide into tensor_parallel {tensor}."
        )
    return tensor, len(ranks) // tensor
