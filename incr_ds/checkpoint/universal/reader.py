"""Reads DeepSpeed's universal checkpoints, by this package or by ds_to_universal, as logical checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.assembly import Assembled, HeldBlock, assemble
from incr_ds.checkpoint.base import (
    STATES,
    CheckpointFacts,
    State,
    check_dtype,
    check_shapes,
    check_state,
    rows_and_columns,
)
from incr_ds.checkpoint.deepspeed.holders import check_joined
from incr_ds.checkpoint.deepspeed.megatron import fused_tensors, is_megatron
from incr_ds.checkpoint.deepspeed.schema import ModelStates, counted_steps, model_content
from incr_ds.checkpoint.naming import logical_names
from incr_ds.checkpoint.progress import counters
from incr_ds.checkpoint.torch_file.load import load_pt
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds
from incr_ds.sharding.joined import joined_parameters

_FILES: Mapping[State, str] = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


@dataclass(frozen=True)
class _Parameters:
    """The parameters of a universal checkpoint, as if one rank held them."""

    model_file: Path
    checkpoint: UniversalCheckpoint
    index: int = 0

    @property
    def shards(self) -> _Parameters:
        return self

    def read(self, name: str, state: State, first: int, stop: int) -> torch.Tensor:
        return self.checkpoint.parameter(name, state)[first:stop]


class UniversalCheckpoint:
    """A folder ``zero/`` with one folder per parameter. Files are mapped on first use."""

    def __init__(self, folder: Path, tag: str, architecture: Architecture, *, trust: bool = False) -> None:
        self._folder, self.architecture, self._trust = folder / tag, architecture, trust
        self._joined = {name: joined.whole for name, joined in joined_parameters(architecture).items()}
        parameters = sorted(self._parameters())
        self._is_megatron = is_megatron(parameters)
        found = {name: name for name in parameters} if self._is_megatron else logical_names(parameters, architecture)
        self._folders = {logical: self._folder / "zero" / parameter for parameter, logical in found.items()}
        if twice := sorted(parameter for parameter, name in found.items() if self._folders[name].name != parameter):
            raise CheckpointError(
                f"{self._folder / 'zero' / twice[0]}: holds {found[twice[0]]}, but so does "
                f"{self._folders[found[twice[0]]].name}; one of them belongs to another checkpoint."
            )
        self._tensors: dict[tuple[str, State], torch.Tensor] = {}
        shapes = {name: tuple(self._tensor(name, "weight").shape) for name in self._folders}
        self._fused: dict[str, Assembled] = {}
        if self._is_megatron:
            holder = (_Parameters(self._folder / "zero", self), shapes)
            self._fused |= fused_tensors(self._folder, [holder], architecture, 1, architecture.sizes["vocab"])
        else:
            self._fused |= self._experts({name: shapes.pop(name) for name in self._joined if name in shapes})
            shapes |= {name: tensor.shape for name, tensor in self._fused.items()}
            check_shapes(architecture, shapes, str(self._folder))
        model = self._model_states()
        files = tuple(sorted(path for path in self._folder.rglob("*.pt") if path.is_file()))
        kind = "DeepSpeed universal, Megatron-DeepSpeed" if self._is_megatron else "DeepSpeed universal"
        states, no_moments = self._states()
        step = None if no_moments else self._step()
        self.facts = CheckpointFacts(
            self._folder,
            kind,
            states,
            step,
            files,
            no_moments=no_moments,
            dtype="float32",
            recorded=counters(model, folder),
        )

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one tensor, fp32."""
        spec = self.architecture.by_name[name]
        first, stop, inside = rows_and_columns(bounds, spec.shape)
        owner = spec.tied_to or name
        check_state(self.facts, name, state)
        if owner in self._fused:
            return self._fused[owner].read(state, first, stop)[inside]
        return self._tensor(owner, state)[first:stop][inside]

    def parameter(self, name: str, state: State) -> torch.Tensor:
        """A whole parameter by its own name, mapped. A joined one is a matrix."""
        found = self._tensor(name, state)
        return found.view(self._joined[name].rows_shape) if name in self._joined else found

    def self_check(self) -> Iterator[str]:
        """Check that every state of every parameter exists and has its shape, and that all steps are equal."""
        step = self.facts.step
        for name, folder in self._folders.items():
            for state in self.facts.states:
                self._tensor(name, state)
            if (
                step is not None
                and (folder / "step.pt").is_file()
                and (found := counted_steps(load_pt(folder / "step.pt", trust=self._trust), folder / "step.pt")) != step
            ):
                raise CheckpointError(f"{folder / 'step.pt'}: step {found}, elsewhere {step}: from another checkpoint.")
            yield name

    def _experts(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Assembled]:
        """The tensors of a mixture's experts, from joined parameters of these shapes."""
        found = {}
        for name, shape in shapes.items():
            part = self._joined[name]
            check_joined(name, part, shape, str(self._folder / "zero"))
            holder = _Parameters(self._folder / "zero", self)
            for block in part.blocks:
                found[block.name] = assemble(block.shape, [HeldBlock(holder, name, block)], str(self._folder))
        return found

    def _parameters(self) -> Iterator[str]:
        zero = self._folder / "zero"
        for path in zero.glob("*/fp32.pt"):
            yield path.parent.name
        for path in zero.glob("*/"):
            if path.is_dir() and not (path / "fp32.pt").is_file():
                raise CheckpointError(f"{path / 'fp32.pt'}: missing; the checkpoint is incomplete.")

    def _tensor(self, name: str, state: State) -> torch.Tensor:
        key = (name, state)
        if key not in self._tensors:
            self._tensors[key] = self._loaded(name, state)
        return self._tensors[key]

    def _loaded(self, name: str, state: State) -> torch.Tensor:
        path = self._folders[name] / _FILES[state]
        content = load_pt(path, trust=self._trust)
        tensor = content.get("param") if isinstance(content, dict) else content
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: contains no tensor `param`; not a file of a universal checkpoint.")
        check_dtype(tensor.dtype, f"{name} ({state})", str(path))
        spec = self.architecture.by_name.get(name) or self._joined.get(name)
        # A conversion from ZeRO-3 leaves tensors flattened.
        if spec is not None and tensor.dim() == 1 and tensor.numel() == spec.numel:
            tensor = tensor.view(spec.shape)
        if spec is not None and tensor.shape != spec.shape and state != "weight":
            raise CheckpointError(f"{path}: expected shape {list(spec.shape)}, found {list(tensor.shape)}.")
        return tensor

    def _states(self) -> tuple[tuple[State, ...], str | None]:
        """The states that every parameter has, and the reason why there are no moments, if so."""
        known = {*_FILES.values(), "step.pt"}
        beside = {path.name for folder in self._folders.values() for path in folder.glob("*.pt")}
        if further := sorted(beside - known):
            return (
                "weight",
            ), f"{further[0]} and Adam's moments are the optimizer's state, and growth would lose the former"
        if not {_FILES["exp_avg"], _FILES["exp_avg_sq"]} & beside:
            return ("weight",), "the folders of the parameters hold no exp_avg.pt and exp_avg_sq.pt"
        return STATES, None

    def _model_states(self) -> ModelStates:
        files = sorted(self._folder.glob("*mp_rank_*_model_states.pt"))
        if not files:
            raise CheckpointError(f"{self._folder}: no mp_rank_*_model_states.pt; the checkpoint is incomplete.")
        return model_content(load_pt(files[0], trust=self._trust), files[0])

    def _step(self) -> int:
        beside = next(iter(self._folders.values())) / "step.pt"
        if beside.is_file():
            return counted_steps(load_pt(beside, trust=self._trust), beside)
        path = self._folder / "zero" / "optimizer_state.pt"
        content = load_pt(path, trust=self._trust)
        try:
            return counted_steps(content["optimizer_state_dict"]["state"][0]["step"], path)
        except (KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{self._folder}: neither step.pt files nor a step in optimizer_state.pt.") from error
