"""Megatron-core's checkpoints in the formats torch_dist, fsdp_dtensor and torch_dcp as logical checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from incr_ds.checkpoint.assembly import Assembled, HeldBlock, assemble, read_assembled
from incr_ds.checkpoint.base import STATES, CheckpointFacts, Counters, State, check_dtype
from incr_ds.checkpoint.megatron_core.common import (
    FORMAT_FILE,
    arguments,
    one_step,
    optimizer_groups,
    optimizer_steps,
    torch_dist_contents,
)
from incr_ds.checkpoint.megatron_core.configuration import chosen_architecture
from incr_ds.checkpoint.megatron_core.dtensor_folders import dtensor_contents
from incr_ds.checkpoint.megatron_core.keys import EMBEDDING, Located, located
from incr_ds.checkpoint.megatron_core.metadata import FILE, Stored, StoredTensor
from incr_ds.checkpoint.megatron_core.shards import Shards
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds
from incr_ds.sharding.megatron_modules import MEGATRON_CORE, check_modules, modules_of, padding_notes

_BUFFER_STATES = "optimizer.distributed.dp_group_idx_"


@dataclass(frozen=True)
class _Held:
    """A stored tensor, or the one at ``stack`` in it, as a holder of nothing else."""

    files: Shards
    tensor: StoredTensor
    stack: tuple[int, ...]
    model_file: Path
    index: int = 0

    @property
    def shards(self) -> _Held:
        return self

    def read(self, name: str, state: State, first: int, stop: int) -> torch.Tensor:
        return self.files.rows(self.tensor, first, stop, self.stack)


class MegatronCoreCheckpoint:
    """An iteration's folder of a checkpoint that torch.distributed.checkpoint saved. Only metadata is read at first."""

    def __init__(self, folder: Path, config: Path | None) -> None:
        self._folder, self._shards = folder, Shards(folder)
        read_contents = torch_dist_contents if (folder / FORMAT_FILE).is_file() else dtensor_contents
        self._contents = read_contents(folder, self._shards)
        self._stored, self._common_file = self._contents.stored, self._contents.common_file
        self._rows_stored = embedding_rows(self._stored, folder)
        given = arguments(self._contents.common)
        self.architecture = chosen_architecture(folder, config, given, self._rows_stored, self._common_file)
        modules = modules_of(MEGATRON_CORE)
        check_modules(modules, self.architecture, 1, str(folder))
        self._tensors = {state: self._assembled(self._located(state)) for state in STATES}
        if not self._tensors["weight"]:
            raise CheckpointError(f"{folder}: holds no parameters of a GPTModel; expected the key {EMBEDDING}.")
        for state, found in self._tensors.items():
            for key in {held.parameter for tensor in found.values() for held in tensor.held}:
                check_dtype(self._stored.tensors[key].dtype, f"{key} ({state})", str(folder))
        self.facts = self._collect_facts(self._contents.common)

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor: the optimizer's fp32 masters if it has them, and its moments."""
        return read_assembled(self, self._tensors[state], name, state, bounds)

    def self_check(self) -> Iterator[str]:
        """Check the extent and the checksum of every chunk that is read, and yield the names of its tensors."""
        for state in self.facts.states:
            checked: set[str] = set()
            for name, tensor in self._tensors[state].items():
                for key in {held.parameter for held in tensor.held} - checked:
                    self._shards.check(self._stored.tensors[key])
                    checked.add(key)
                yield name

    def _located(self, state: State | Literal["model"]) -> Mapping[str, tuple[Located, ...]]:
        return located(self._stored.tensors, state, self.architecture, str(self._folder))

    def _assembled(self, places: Mapping[str, tuple[Located, ...]]) -> Mapping[str, Assembled]:
        """Every logical tensor, from the blocks of it that are stored."""

        def held(place: Located) -> HeldBlock:
            stack = tuple(number for number, _ in place.stack)
            holder = _Held(self._shards, self._stored.tensors[place.key], stack, self._folder / FILE)
            return HeldBlock(holder, place.key, place.block)

        by_name, where = self.architecture.by_name, str(self._folder)
        return {
            name: assemble(by_name[name].shape, [held(own) for own in found], where) for name, found in places.items()
        }

    def _collect_facts(self, common: Mapping[str, object]) -> CheckpointFacts:
        no_moments = self._contents.no_moments or self._why_no_moments()
        step = None if no_moments else self._step(common)
        given, weights = arguments(common), self._stored.tensors
        saved = next(iter(self._located("model").values()))[0].key
        names = {"tensor_parallel": "tensor_model_parallel_size", "pipeline_parallel": "pipeline_model_parallel_size"}
        layout = {name: int(given[key]) for name, key in names.items() if isinstance(given.get(key), int)}
        iteration = common.get("iteration")
        samples = given.get("consumed_train_samples")
        return CheckpointFacts(
            self._folder,
            f"Megatron-core {self._contents.format}",
            ("weight",) if no_moments else STATES,
            step,
            tuple(sorted(path for path in self._folder.iterdir() if path.suffix in (".distcp", ".pt"))),
            layout,
            no_moments,
            dtype=weights[saved].dtype,
            optimizer_groups=() if no_moments else optimizer_groups(common.get("optimizer")),
            notes=padding_notes(self.architecture, self._rows_stored),
            recorded=Counters(
                global_steps=iteration if isinstance(iteration, int) else None,
                global_samples=samples if isinstance(samples, int) else None,
            ),
        )

    def _why_no_moments(self) -> str | None:
        if self._tensors["exp_avg"] and self._tensors["exp_avg_sq"]:
            return None
        keys = [*self._stored.tensors, *self._stored.objects]
        if any(key.startswith(_BUFFER_STATES) or f".{_BUFFER_STATES}" in key for key in keys):
            return (
                "the distributed optimizer's state is saved in the layout of its buffers (dp_reshardable, or an older one), "
                "which does not name the parameters; save with --dist-ckpt-optim-fully-reshardable"
            )
        if any(key.startswith("optimizer.state.exp_avg.") and key.endswith(EMBEDDING) for key in keys):
            return (
                "the distributed optimizer's state is flattened (fully_sharded_model_space) without their shapes; save with "
                "--dist-ckpt-optim-fully-reshardable"
            )
        other = sorted(key for key in keys if key.startswith("optimizer."))
        return (
            f"the optimizer's state is not Adam's: it has {other[0]}" if other else "it was saved without the optimizer"
        )

    def _step(self, common: Mapping[str, object]) -> int:
        found = set(optimizer_steps(common.get("optimizer")))
        for key, place in self._stored.objects.items():
            if ".dp_group_idx_" in key and ".optimizer/" in key:
                found |= set(optimizer_steps(self._shards.content(place)))
        return one_step(found, self._common_file)


def embedding_rows(stored: Stored, folder: Path) -> int:
    """Rows of the word embedding, padding included."""
    for key, tensor in stored.tensors.items():
        if key.endswith(EMBEDDING) and not key.startswith("optimizer.") and len(tensor.shape) == 2:
            return tensor.shape[0]
    raise CheckpointError(f"{folder}: no key {EMBEDDING}; only models of the class GPTModel can be read.")
