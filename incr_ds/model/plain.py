"""The model without a pipeline. It has Hugging Face parameter names, so transformers can use its ZeRO checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import Role, TensorSpec
from incr_ds.data.targets import Targets
from incr_ds.kernels.rows import Divergence
from incr_ds.losses.arguments import Scalar
from incr_ds.losses.distillation import DistillationLoss
from incr_ds.losses.teachers import split_targets
from incr_ds.model.blocks import DecoderLayer
from incr_ds.model.embedding import InputEmbedding, head_input
from incr_ds.model.layers import LayerFactory, module_path
from incr_ds.model.positions import document_positions
from incr_ds.sharding.placement import pipeline_layer


class LanguageModel(nn.Module):
    """Pipeline layers ``layers`` of a model: 0 is the embedding, 1..L the decoder, L+1 the final norm, L+2 the head.

    With all of them it is the whole model. A teacher in a pipeline has a part on each stage.
    """

    def __init__(self, factory: LayerFactory, layers: range) -> None:
        super().__init__()
        architecture = factory.architecture
        # nn.Module does not search dictionaries, so the modules are registered once, at transformers' paths.
        self._ends: dict[Role, nn.Module] = {}
        self._blocks: list[DecoderLayer] = []
        for path, spec in _places(architecture, layers):
            if spec.layer is None:
                module = self._ends[spec.role] = factory.module(spec.role)
            else:
                self._blocks.append(DecoderLayer(factory, spec.layer))
                module = self._blocks[-1].block
            _attach(self, path, module)
        tokens = self._ends.get("embedding")
        self._architecture = architecture
        positions = cast(nn.Embedding | None, self._ends.get("positions"))
        self._embedding = None if tokens is None else InputEmbedding(architecture, tokens, positions)
        if architecture.num_layers + 2 in layers:
            self.lm_head = factory.head(
                None if tokens is None or not architecture.tied else tokens.get_parameter("weight")
            )
        self._positions = factory.positions
        self._document_end = factory.document_end
        self.routing, self._router_loss = factory.routing, factory.router_loss

    def forward(
        self,
        input_ids: Tensor,
        targets: Targets,
        teacher_hidden: Tensor | None = None,
        teacher_head: Tensor | None = None,
        alpha: Scalar = 0.0,
        temperature: Scalar = 1.0,
        divergence: Divergence | None = None,
    ) -> DistillationLoss:
        """Loss of the whole model. ``targets`` holds the token after each of ``input_ids`` [B, S], or also a cached teacher.

        ``divergence`` replaces the run's.
        """
        labels, cached = split_targets(targets, self.lm_head.vocab_size)
        hidden = self.hidden_states(input_ids)  # [B, S, H]
        weights = {"alpha": alpha, "temperature": temperature, "divergence": divergence}
        parts: DistillationLoss = self.lm_head(hidden, labels, teacher_hidden, teacher_head, teacher=cached, **weights)
        if not self.routing.is_mixture:
            return parts
        return with_router_loss(parts, self.routing.take_mean(hidden), self._router_loss)

    def hidden_states(self, stream: Tensor, positions: Tensor | None = None) -> Tensor:
        """Run the layers up to the head. ``stream`` is input_ids [B, S] on the first stage, otherwise hidden [B, S, H].

        On later stages ``positions`` [B, S] says where documents begin, if attention begins anew there.
        """
        if self._embedding is not None:
            positions = None if self._document_end is None else document_positions(stream, self._document_end)
            # [B, S] -> [B, S, H]
            stream = self._embedding.hidden_states(stream, training=self.training, positions=positions)
        self._positions.begin(positions)
        for layer in self._blocks:
            stream = layer.run(stream)
        if "final_norm" not in self._ends:
            return stream
        return head_input(self._architecture, self._ends["final_norm"](stream))


def with_router_loss(parts: DistillationLoss, router: Tensor, factor: float) -> DistillationLoss:
    """``parts`` with the router loss [1] added to the loss, times ``factor``.

    Also if that is 0: a pipeline's stages wait for the gradient of what they sent.
    """
    return parts._replace(loss=parts.loss + factor * router[0])


def _places(architecture: Architecture, layers: range) -> Iterator[tuple[str, TensorSpec]]:
    """Paths, in transformers' model, of the modules of pipeline ``layers`` up to the head.

    They come in the order of the parameters, each with a tensor that the module holds.
    """
    seen = set()
    for spec in architecture.tensors:
        layer = pipeline_layer(spec, architecture.num_layers)
        path = module_path(architecture, spec)
        if layer in layers and layer <= architecture.num_layers + 1 and path not in seen:
            seen.add(path)
            yield path, spec


def _attach(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
