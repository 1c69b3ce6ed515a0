"""The model as DeepSpeed pipeline stages, cut and named as incr_ds.sharding.placement declares."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn

from incr_ds.arch.tensors import Role
from incr_ds.config.layout import ParallelLayout
from incr_ds.data.targets import Targets
from incr_ds.kernels.rows import Divergence
from incr_ds.losses.distillation import DistillationLoss
from incr_ds.losses.head import DistillationHead
from incr_ds.losses.teachers import split_targets
from incr_ds.model.blocks import DecoderLayer
from incr_ds.model.embedding import InputEmbedding, head_input
from incr_ds.model.layers import LayerFactory
from incr_ds.model.plain import with_router_loss
from incr_ds.model.positions import document_positions
from incr_ds.model.teacher import Teacher, pack
from incr_ds.sharding.placement import TIED_KEY, stage_layers

Stream = Tensor | tuple[Tensor, ...]


class _Received(NamedTuple):
    """What a stage gets.

    ``student`` is input_ids [B, S] or hidden states [B, S, Hs], ``taught`` input_ids or packed bytes, see ``pack``. ``router``
    [1] is the router loss of the stages before, and ``positions`` [B, S] come if documents are kept apart.
    """

    student: Tensor
    taught: Tensor
    router: Tensor | None
    positions: Tensor | None


class EmbeddingLayer(nn.Module):
    """Pipeline layer 0. If it is tied to the head, the last stage has one too, with ``with_positions`` false."""

    def __init__(self, factory: LayerFactory, with_positions: bool = True) -> None:
        super().__init__()
        architecture = factory.architecture
        roles: list[Role] = ["embedding"]
        if with_positions and "positions" in architecture.sizes:
            roles.append("positions")
        modules = [_add(self, factory, role) for role in roles]
        positions = cast(nn.Embedding, modules[1]) if len(modules) > 1 else None
        self._embedding = InputEmbedding(architecture, modules[0], positions)
        self._positions = factory.positions

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, H]."""
        given = self._positions.given
        return self._embedding.hidden_states(input_ids, training=self.training, positions=given)


class BlockLayer(nn.Module):
    """Pipeline layer ``layer`` + 1."""

    def __init__(self, factory: LayerFactory, layer: int) -> None:
        super().__init__()
        self._layer = DecoderLayer(factory, layer)
        self.block = self._layer.block

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self._layer.run(hidden)


class NormLayer(nn.Module):
    """Pipeline layer L + 1."""

    def __init__(self, factory: LayerFactory) -> None:
        super().__init__()
        # In a tuple, which torch does not search for modules: it is registered once, under transformers' name.
        self._norm = (_add(self, factory, "final_norm"),)
        self._architecture = factory.architecture

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return head_input(self._architecture, self._norm[0](hidden))


class HeadLayer(nn.Module):
    """Pipeline layer L + 2. It owns the head; the loss function, which gets the labels, applies it."""

    def __init__(self, factory: LayerFactory) -> None:
        super().__init__()
        self.lm_head = factory.head()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden`` unchanged."""
        return hidden


def _add(owner: nn.Module, factory: LayerFactory, role: Role) -> nn.Module:
    """Build the module of ``role`` and register it in ``owner`` under the name that it has beside transformers' layers."""
    module = factory.module(role)
    owner.add_module(_local(factory, role), module)
    return module


def _local(factory: LayerFactory, role: Role) -> str:
    return factory.path(role).removeprefix(f"{factory.architecture.family.base}.")


def _hand_on(module: nn.Module, hidden: Tensor) -> Tensor:
    return hidden


class StagedLanguageModel(PipelineModule):
    """One rank's stage. Stages exchange the student's hidden states and, if the teacher runs, also the teacher's.

    If attention begins anew in each document, they exchange positions, too, since only the first stage has the tokens. A
    mixture's stages hand on the sum of router losses. ``observe`` is called with the loss of every micro-batch on the last
    stage. ``alpha``, ``temperature`` and ``divergence`` (None: the run's) are set before each step to the same values on
    every rank. ``teaching`` says whether the teacher runs.
    """

    def __init__(
        self,
        factory: LayerFactory,
        topology: ProcessTopology,
        layout: ParallelLayout,
        teacher: Teacher | None,
        observe: Callable[[DistillationLoss], None],
    ) -> None:
        architecture = factory.architecture
        self._stages = stage_layers(architecture.num_layers, layout)
        blocks = [LayerSpec(BlockLayer, factory, layer) for layer in range(architecture.num_layers)]
        first, last = _ends(factory)
        # DeepSpeed prints its partition to rank 0's standard output.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                [first, *blocks, LayerSpec(NormLayer, factory), last], topology=topology, loss_fn=self.loss
            )
        self.alpha: float = 0.0
        self.temperature: float = 1.0
        self.divergence: Divergence | None = None
        self.teaching = False
        self._document_end, self._positions = factory.document_end, factory.positions
        self.routing, self._router_loss = factory.routing, factory.router_loss
        # Set without nn.Module's registration: the head's parameter belongs to its pipeline layer and must not get a
        # second name, and the teacher is not part of the student.
        object.__setattr__(self, "_teacher", teacher)
        object.__setattr__(self, "_head", self._find_head(factory))
        self._observe = observe

    @property
    def has_teacher(self) -> bool:
        """True if there is a teacher. All stages have one or none has."""
        return self._teacher is not None

    def forget_teacher(self) -> None:
        """Free the memory of the teacher's part on this stage. All stages do so at the same step."""
        object.__setattr__(self, "_teacher", None)

    def forward(self, stream: Stream) -> Stream:
        """Run this stage on the student's hidden states, and on the teacher's beside them while ``teaching``."""
        received = self._received(stream)
        self._positions.begin(received.positions)
        sent = [self._own_layers(received.student)]
        if self.teaching:
            sent.append(pack(self._teacher.forward(received.taught, received.positions)))
        if self.routing.is_mixture:
            sent.append(self._routed(sent[0], received.router))
        if received.positions is not None:
            sent.append(received.positions)
        return tuple(sent) if len(sent) > 1 else sent[0]

    def _received(self, stream: Stream) -> _Received:
        parts = list(stream) if isinstance(stream, tuple) else [stream]
        if len(parts) == 1 and not parts[0].is_floating_point():  # the tokens come alone
            tokens, end = parts[0], self._document_end
            return _Received(tokens, tokens, None, None if end is None else document_positions(tokens, end))
        positions = None if self._document_end is None else parts.pop()
        router = parts.pop() if self.routing.is_mixture else None
        return _Received(parts[0], parts[-1], router, positions)

    def _routed(self, hidden: Tensor, before: Tensor | None) -> Tensor:
        """The router loss [1] of this stage and of those ``before``."""
        own = self.routing.take_mean(hidden)
        routed = own if before is None else before + own
        # DeepSpeed asks every stage for a gradient, also where everything that the routers read is frozen.
        return routed if routed.requires_grad or not hidden.requires_grad else routed.requires_grad_()

    def loss(self, outputs: Stream, targets: Targets) -> Tensor:
        """Loss of the last stage's ``outputs`` against ``targets``: labels [B, S], or also a cached teacher."""
        assert self._head is not None
        labels, cached = split_targets(targets, self._head.vocab_size)
        received = self._received(outputs)
        teacher = (self._teacher.unpack(received.taught), self._teacher.head) if self.teaching else (None, None)
        weights = {"alpha": self.alpha, "temperature": self.temperature, "divergence": self.divergence}
        parts: DistillationLoss = self._head(received.student, labels, *teacher, teacher=cached, **weights)
        if received.router is not None:
            parts = with_router_loss(parts, received.router, self._router_loss)
        self._observe(parts)
        return parts.loss

    def _own_layers(self, student: Tensor) -> Tensor:
        hidden: Tensor = super().forward(student)
        return hidden

    def _find_head(self, factory: LayerFactory) -> DistillationHead | None:
        if self.stage_id != self.num_stages - 1:
            return None
        if factory.architecture.tied:
            embedding = self.tied_modules[TIED_KEY].get_submodule(_local(factory, "embedding"))
            return factory.head(embedding.get_parameter("weight"))
        head: DistillationHead = self.forward_funcs[-1].lm_head
        return head

    def _partition_layers(self, method: Any = None) -> None:
        self.parts = [stage.start for stage in self._stages] + [self._num_layers]
        own = self._stages[self.stage_id]
        self._set_bounds(start=own.start, stop=own.stop)


def _ends(factory: LayerFactory) -> tuple[LayerSpec, LayerSpec]:
    if not factory.architecture.tied:
        return LayerSpec(EmbeddingLayer, factory), LayerSpec(HeadLayer, factory)
    weight = f"{_local(factory, 'embedding')}.weight"
    return (
        TiedLayerSpec(TIED_KEY, EmbeddingLayer, factory, tied_weight_attr=weight),
        TiedLayerSpec(TIED_KEY, EmbeddingLayer, factory, False, tied_weight_attr=weight, forward_fn=_hand_on),
    )
