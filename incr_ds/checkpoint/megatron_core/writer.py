"""Writes Megatron-core's distributed checkpoints (torch_dist), which Megatron-LM loads under any parallel degrees.

Each layer has a file of its own. The state of the optimizer is stored parameter by parameter, which Megatron-core calls
``fully_reshardable``. Format facts were read in megatron-core 0.16.1 (dist_checkpointing/, optimizer/), in Megatron-LM
(megatron/training/checkpointing.py, 2026-08-22) and in Transformer Engine 2.18 (pytorch/module/base.py).
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from incr_ds.checkpoint.megatron_core.arguments import arguments_of
from incr_ds.checkpoint.megatron_core.chunks import NewChunk, chunks_by_layer, stored_states
from incr_ds.checkpoint.megatron_core.common import FILE as COMMON_FILE
from incr_ds.checkpoint.megatron_core.common import FORMAT, FORMAT_FILE
from incr_ds.checkpoint.megatron_core.index import IndexedTensor, index_bytes
from incr_ds.checkpoint.megatron_core.metadata import FILE as INDEX_FILE
from incr_ds.checkpoint.megatron_core.metadata import Place
from incr_ds.checkpoint.megatron_core.target import MegatronCoreTarget
from incr_ds.checkpoint.sink import Sink
from incr_ds.checkpoint.streaming import Slices, StreamedTensor, TargetFile
from incr_ds.checkpoint.torch_file.write import ArchiveFile, archive_of
from incr_ds.sharding.megatron_modules import MEGATRON_CORE, check_experts, check_modules, modules_of

_ARCHIVE = "archive"  # the inner folder of an archive that torch.save writes to a stream
_EXTRA_STATE = "_extra_state"
_ATTENTION = "self_attention.core_attention"  # a module without parameters
_SHARDING = "fully_reshardable"


@dataclass(frozen=True, eq=False)
class ShardFile:
    """__N_0.distcp: the chunks of one layer, one archive of torch.save after the other, and an empty object."""

    target: MegatronCoreTarget
    layer: int
    chunks: tuple[NewChunk, ...]

    @property
    def name(self) -> str:
        """Name of the file in the iteration's folder."""
        return f"__{self.layer}_0.distcp"

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.folder}/{self.name}"

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """The data of all chunks."""
        return tuple(chunk.tensor for chunk in self.chunks)

    def write(self, sink: Sink, slices: Slices) -> None:
        """Write the archives."""
        for chunk in self.chunks:
            archive_of(chunk.tensor).write(sink, _ARCHIVE, slices)
        _EMPTY.write(sink, _ARCHIVE, slices)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where each chunk will be, and at the end the empty object."""
        found, position = [], 0
        for archive in (*(archive_of(chunk.tensor) for chunk in self.chunks), _EMPTY):
            found.append(Place(self.name, position, archive.num_bytes(_ARCHIVE)))
            position += found[-1].length
        return tuple(found)

    def objects(self) -> Iterator[str]:
        """Keys of the objects that Transformer Engine's modules expect, which are empty unless it computes in 8 bits."""
        for chunk in self.chunks:
            module, stacked = chunk.keys[0].rpartition(".")[0], chunk.stacked
            if module.startswith("decoder."):
                yield _object(module, chunk.offsets[:stacked] or (0,), chunk.whole[:stacked] or (1,))
            if module.startswith("decoder.layers."):
                yield _object(f"decoder.layers.{_ATTENTION}", chunk.offsets[:1], chunk.whole[:1])


def _object(module: str, number: tuple[int, ...], count: tuple[int, ...]) -> str:
    """The key of a module's extra state, for one of the layers, or of the layers and experts, that are stacked."""
    own, whole = (".".join(map(str, sizes)) for sizes in (number, count))
    return f"{module}.{_EXTRA_STATE}/shard_{own}_{whole}"


_EMPTY = archive_of([None])


@dataclass(frozen=True)
class IndexFile:
    """.metadata: the place of every chunk."""

    target: MegatronCoreTarget
    shards: tuple[ShardFile, ...]

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.folder}/{INDEX_FILE}"

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """None."""
        return ()

    def write(self, sink: Sink, slices: Slices) -> None:
        """Write the file. Places follow from shapes, so the shards need not exist."""
        tensors: dict[str, IndexedTensor] = {}
        objects: dict[str, Place] = {}
        for shard in self.shards:
            for chunk, place in zip(shard.chunks, shard.places[:-1], strict=True):
                for key in chunk.keys:
                    held = tensors.setdefault(key, IndexedTensor(chunk.whole, chunk.tensor.dtype))
                    held.chunks[chunk.offsets, chunk.tensor.shape] = place
            objects |= dict.fromkeys(shard.objects(), shard.places[-1])
        sink.write(index_bytes(tensors, objects))


@dataclass(frozen=True)
class CommonFile(ArchiveFile):
    """common.pt: what all ranks share."""

    target: MegatronCoreTarget

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.folder}/{COMMON_FILE}"

    def content(self) -> dict[str, Any]:
        """The arguments, the counters, and the optimizer's and the scheduler's state without tensors."""
        target = self.target
        content = {
            "args": Namespace(**target.arguments(COMMON_FILE)),
            "checkpoint_version": 3.0,
            "iteration": target.iteration if target.has_moments else 0,
            "num_floating_point_operations_so_far": 0,
            "content_metadata": {
                "distrib_optim_sharding_type": _SHARDING,
                "distrib_optim_fully_reshardable_mem_efficient": False,
                "singleton_local_shards": False,
                "chained_optim_avoid_prefix": True,
            },
        }
        if not target.has_moments:
            return content
        return {**content, "optimizer": self._optimizer(), "opt_param_scheduler": target.scheduler()}

    def _optimizer(self) -> dict[Any, Any]:
        """What is not a tensor in the optimizer or, with expert parallelism, in that of the experts and that of the rest."""
        if self.target.layout.expert_parallel == 1:
            return self._one_optimizer(of_experts=False)
        return {number: self._one_optimizer(of_experts=bool(number)) for number in range(2)}

    def _one_optimizer(self, *, of_experts: bool) -> dict[str, Any]:
        """The parameter groups, where the distributed optimizer, the one with masters and the one without expect them."""
        kinds = (True,) if of_experts else (True, False)  # experts have matrices alone, which decay
        groups = [self.target.group(decays=kind) | {"is_expert_parallel": of_experts} for kind in kinds]
        content: dict[str, Any] = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": _SHARDING}
        return content | ({"param_groups": groups} if self.target.dtype == torch.float32 else {})


@dataclass(frozen=True)
class FormatFile:
    """metadata.json: the names of the formats of shards and of common.pt."""

    target: MegatronCoreTarget

    @property
    def path(self) -> str:
        """Path inside the target folder."""
        return f"{self.target.folder}/{FORMAT_FILE}"

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """None."""
        return ()

    def write(self, sink: Sink, slices: Slices) -> None:
        """Write the file."""
        content = {
            "sharded_backend": FORMAT,
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        sink.write(json.dumps(content).encode())


def megatron_core_files(target: MegatronCoreTarget, where: str) -> tuple[TargetFile, ...]:
    """Every file of a checkpoint. Raises LayoutError if Megatron-core does not have this model or cannot cut it so."""
    layout = target.layout
    check_modules(modules_of(MEGATRON_CORE), target.architecture, layout.tensor_parallel, where)
    check_experts(target.architecture, layout.expert_parallel, where)
    arguments_of(target.architecture, where)
    states = stored_states(target.dtype, target.has_moments)
    layers = chunks_by_layer(target.architecture, layout.tensor_parallel, target.vocabulary, states)
    shards = tuple(ShardFile(target, layer, chunks) for layer, chunks in layers.items())
    return (*shards, IndexFile(target, shards), CommonFile(target), FormatFile(target))
