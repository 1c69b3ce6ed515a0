"""The growth recipe: what the target is, by which operators it is reached, and how it is laid out on disk."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Seed, Settings, merged, parse_settings
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.yaml_file import read_yaml


class UnitRecipe(Settings):
    """New FFN neurons or attention heads: ``zero-output`` (random inputs, zero outputs) or ``copy`` (shares split), which keep
    the function; ``random`` or ``constant`` (filled as ``hidden`` is, outputs too), which do not."""

    new: Literal["zero-output", "copy", "random", "constant"] = "zero-output"


class SymmetryBreaking(Settings):
    """How copies of a residual dimension, neuron or head are made to differ without changing the function.

    ``per-element``: each weight that reads c copies gives copy j the share (1 + scale * z_j) / c, with z_j of mean 0 over
    the copies and variance 1, drawn per element; the shares of the copies sum to 1. ``noise``: even shares plus noise that
    cancels over the copies, ``snr_db`` decibels below the tensor's root mean square. ``diagonal``: where rows and
    columns are copied equally often, the rows of copy j read copy j alone. ``none``: even shares; training then never
    leaves the copied subspace.
    """

    method: Literal["per-element", "noise", "diagonal", "none"] = "per-element"
    scale: float = Field(default=0.5, ge=0.0)
    snr_db: float = Field(default=10.0, ge=0.0)
    seed: Seed = 0


HiddenMethod = Literal[
    "auto", "integer", "isometric", "zero", "zero-scaled-eps", "mean", "centred", "lemon", "fpi", "random", "constant"
]


class WidthRecipe(Settings):
    """Operators for the width axes.

    ``hidden``: ``integer`` copies (a multiple of the old size), ``isometric`` copies (any larger size), ``zero`` padding
    with writers scaled so that eps stays, ``zero-scaled-eps`` padding with eps scaled in the config, ``mean`` padding for
    LayerNorm, ``centred``: zero padding for LayerNorm, with writers from which their mean was taken, ``lemon``: as many
    whole copies as fit, and padding for the rest, or ``auto``: integer where it divides, elsewhere isometric (RMSNorm) or
    mean (LayerNorm). These keep the function. These do not: ``fpi``, whole and some more randomly chosen copies, norms
    unchanged; ``random`` and ``constant``, new positions filled with normal numbers of deviation ``std`` (None: the
    config's) or with ``constant``, as new FFN neurons and heads may be.

    ``order`` is that of copies: the whole old axis again and again (0 1 2 0 1 2), each residual position and FFN neuron
    beside its copies (0 0 1 1 2 2), or ``drawn``: the old axis once, and then any of it (0 1 2 2 0 2), of heads too, as
    Net2Net and bert2BERT have it. Residual positions are drawn under ``isometric``, and always under ``fpi``; the equal
    copies of ``integer`` are those of ``tile``.

    ``copies_from`` says which layer the copies beyond the first of FFN units, heads and residual positions are of, in what
    a layer's matrices produce: its own, or the next one (bert2BERT's advanced knowledge initialization; the last layer
    copies itself). The latter does not keep the function.
    """

    hidden: HiddenMethod = "auto"
    std: float | None = Field(default=None, gt=0.0)
    constant: float = 0.0
    ffn: UnitRecipe = UnitRecipe()
    heads: UnitRecipe = UnitRecipe()
    order: Literal["tile", "interleave", "drawn"] = "tile"
    copies_from: Literal["own-layer", "next-layer"] = "own-layer"
    symmetry_breaking: SymmetryBreaking = SymmetryBreaking()


class DepthRecipe(Settings):
    """Where new layers go and what they hold.

    ``interleave`` spreads them evenly, each after the layer it copies; ``stack`` puts copies of the whole stack on top;
    ``append`` and ``prepend`` add copies of the last or first layers at that end; ``solar`` joins two overlapping
    copies; ``midas`` repeats the middle; ``expand`` adds a layer after each of equal groups; ``map`` takes the source
    layer of every target layer from the list ``map``.

    New layers that are ``zero-output`` (copies with zero output projections) or ``identity`` (zero norms, matrices of
    ones on the diagonal) write nothing at first, which keeps the function. ``copy`` does not keep it, nor does
    ``halved``: copies, with the outputs of all layers that share a source divided by their number.
    """

    method: Literal["interleave", "stack", "append", "prepend", "solar", "midas", "expand", "map"] = "interleave"
    map: list[int] | None = None
    new: Literal["zero-output", "identity", "copy", "halved"] = "zero-output"

    @model_validator(mode="after")
    def _map_belongs_to_its_method(self) -> Self:
        if (self.map is not None) != (self.method == "map"):
            raise ValueError(
                f"method: {self.method} and map do not fit; give the list map with method: map, and only then"
            )
        return self


class ExpertsRecipe(Settings):
    """How a dense FFN becomes the experts of a mixture (``target.model_type`` mixtral or qwen3_moe).

    ``copy``: every expert is the FFN (sparse upcycling). ``virtual-groups``: each expert is one of several equal parts of
    it, its output multiplied by their number, and the router scores the parts of a whole alike, so that it picks them
    together. Both keep the function, since the shares of the chosen experts sum to 1. ``drop``: copies, in each of which a
    share ``ratio`` of the neurons, drawn anew for each, starts from normal numbers of the mean and deviation of what it
    replaces (drop-upcycling); it does not keep the function.
    """

    new: Literal["copy", "virtual-groups", "drop"] = "copy"
    ratio: float = Field(default=0.5, gt=0.0, lt=1.0)


class FittedAxis(Settings):
    """Factors per new position of a width axis: on what is written there, and on how it is read."""

    amplitude: list[float]
    share: list[float]


class FittedOperators(Settings):
    """What tools/fit_growth.py found, on top of the recipe's own operators (after LiGO, Wang et al., arXiv 2303.00980).

    ``axes`` holds factors of the axes that grow. ``layers`` lists for each target layer the source layers that its tensors
    are a sum of, with their weights; empty: as the layer map has them.
    """

    axes: dict[str, FittedAxis] = Field(default_factory=dict)
    layers: list[dict[int, float]] = Field(default_factory=list)


class TargetLayout(ParallelLayout):
    """The layout on disk: ``deepspeed`` (its own ZeRO files for this very layout, moments included), ``universal``
    (DeepSpeed's one folder for every data-parallel size and ZeRO stage, moments included) or ``huggingface`` (weights only).

    ``dtype`` is the dtype of the model's own weights; fp32 masters and moments are always fp32. ``auto`` keeps fp32
    for a Hugging Face folder and the source's precision for DeepSpeed. ``modules`` names the training code that will load it:
    this package's and transformers' own, or ``megatron-deepspeed`` with its vocabulary padded to a multiple of
    ``vocabulary_multiple`` times tensor_parallel. ``sub_group_size`` must be that of the engine's zero_optimization under ZeRO-3.
    """

    format: Literal["deepspeed", "universal", "huggingface"] = "deepspeed"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    modules: Literal["own", "megatron-deepspeed"] = "own"
    vocabulary_multiple: int = Field(default=128, ge=1)
    sub_group_size: int = Field(default=1_000_000_000, ge=1)

    @model_validator(mode="after")
    def _modules_need_a_pipeline_module(self) -> Self:
        if self.modules != "own" and (self.format == "huggingface" or self.zero_stage > 1):
            raise ValueError(
                f"modules: {self.modules} with format: {self.format} and zero_stage: {self.zero_stage}; its models are pipeline "
                "modules, written as format: deepspeed or universal with zero_stage: 1"
            )
        return self


class Method(Settings):
    """A published method: where, what it grows, how far ``recipe`` is it, and the recipe's keys."""

    grows: list[Literal["width", "depth"]]
    published: str
    known: str
    recipe: dict[str, Any]


@cache
def methods() -> dict[str, Method]:
    """The published methods of methods.yaml, by name."""
    path = Path(__file__).with_name("methods.yaml")
    return {name: parse_settings(content, Method, f"{path}: {name}") for name, content in read_yaml(path).items()}


_RENAMED_MODES = {"exact": "rescale", "keep": "copy"}


class GrowthRecipe(Settings):
    """A whole recipe. ``target`` lists the fields of the source's Hugging Face config that change.

    ``recipe`` names a published method (methods.yaml), whose keys hold where the file does not state them itself.
    """

    recipe: str | None = None
    target: dict[str, Any]
    width: WidthRecipe = WidthRecipe()
    depth: DepthRecipe = DepthRecipe()
    experts: ExpertsRecipe = ExpertsRecipe()
    fitted: FittedOperators | None = None
    optimizer: Literal["rescale", "copy", "reset-new", "reset"] = "rescale"
    function_preserving: Literal["required", "preferred"] = "preferred"
    layout: TargetLayout = TargetLayout()

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, content: Any) -> Any:
        if isinstance(content, dict):
            if "exact" in content:
                raise ValueError("exact: this key is function_preserving now, with the same values")
            mode = content.get("optimizer")
            if isinstance(mode, str) and mode in _RENAMED_MODES:
                raise ValueError(f"optimizer: {mode} is {_RENAMED_MODES[mode]} now")
        return content

    @model_validator(mode="before")
    @classmethod
    def _from_method(cls, content: Any) -> Any:
        name = content.get("recipe") if isinstance(content, dict) else None
        if not isinstance(name, str):
            return content
        if name not in methods():
            raise ValueError(f"recipe: {name!r} is not a method; known: {', '.join(methods())}")
        return merged(methods()[name].recipe, content)
