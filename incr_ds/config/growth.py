"""The growth recipe: the target, the operators that lead to it, and its layout on disk."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from incr_ds.config.fields import Seed, Settings, merged, parse_settings
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.yaml_file import read_yaml


class UnitRecipe(Settings):
    """How new FFN neurons or attention heads start.

    ``zero-output`` (random inputs, zero outputs) and ``copy`` (copies that divide the shares) keep the function.
    ``random`` and ``constant`` (inputs and outputs filled as under ``hidden``) do not.
    """

    new: Literal["zero-output", "copy", "random", "constant"] = "zero-output"


class SymmetryBreaking(Settings):
    """How copies of a residual dimension, neuron or head are made to differ without changing the function.

    ``per-element``: a weight that reads c copies gives copy j the share (1 + scale * z_j) / c. The z_j are drawn per
    element and have mean 0 and variance 1 over the copies, so the shares sum to 1. ``noise``: equal shares plus noise
    that cancels over the copies, ``snr_db`` decibels below the tensor's root mean square. ``diagonal``: where rows and
    columns are copied equally often, the rows of copy j read copy j alone. ``none``: equal shares. Training then never
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

    ``hidden`` is how the residual stream grows. These keep the function:

    - ``integer``: copies, to a multiple of the old size.
    - ``isometric``: copies, to any larger size.
    - ``zero``: padding, with writers scaled so that eps stays.
    - ``zero-scaled-eps``: padding, with eps scaled in the config.
    - ``mean``: padding for LayerNorm.
    - ``centred``: zero padding for LayerNorm. The mean is subtracted from the writers.
    - ``lemon``: as many whole copies as fit, and padding for the rest.
    - ``auto``: integer where it divides, otherwise isometric (RMSNorm) or mean (LayerNorm).

    These do not keep it: ``fpi`` adds randomly chosen copies to the whole ones and leaves norms unchanged. ``random``
    and ``constant`` fill new positions with normal numbers of standard deviation ``std`` (None: the config's) or with
    ``constant``. The same values fill new FFN neurons and heads that are ``random`` or ``constant``.

    ``order`` is the order of copies. ``tile`` repeats the whole old axis (0 1 2 0 1 2). ``interleave`` puts each
    residual position and FFN neuron beside its copies (0 0 1 1 2 2). ``drawn`` takes the old axis once and then draws
    from it (0 1 2 2 0 2), for heads too, as in Net2Net and bert2BERT. Residual positions are drawn under ``isometric``,
    and always under ``fpi``. With equal copies, as under ``integer``, they are in the order of ``tile``.

    ``copies_from`` is the layer from which a layer's matrices take the outputs of further copies of FFN units, heads
    and residual positions. It is the layer itself (``own-layer``), or the next one (``next-layer``, bert2BERT's advanced
    knowledge initialization, where the last layer copies itself). The latter does not keep the function.
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

    ``interleave`` spreads them evenly, each after the layer that it copies. ``stack`` puts copies of the whole stack on
    top. ``append`` and ``prepend`` add copies of the last or first layers at that end. ``solar`` joins two overlapping
    copies. ``midas`` repeats the middle. ``expand`` adds a layer after each of several equal groups. ``map`` reads the
    source layer of every target layer from the list ``map``.

    New layers that are ``zero-output`` (copies with zero output projections) or ``identity`` (zero norms, matrices with
    ones on the diagonal) write nothing at first, which keeps the function. ``copy`` does not keep it. Neither does
    ``halved``, which copies and divides the outputs of all layers that share a source by their number.
    """

    method: Literal["interleave", "stack", "append", "prepend", "solar", "midas", "expand", "map"] = "interleave"
    map: list[int] | None = None
    new: Literal["zero-output", "identity", "copy", "halved"] = "zero-output"

    @model_validator(mode="after")
    def _map_belongs_to_its_method(self) -> Self:
        if (self.map is not None) != (self.method == "map"):
            raise ValueError(
                f"method: {self.method} and map do not go together; give the list map with method: map, and only then"
            )
        return self


class ExpertsRecipe(Settings):
    """How a dense FFN becomes the experts of a mixture (``target.model_type`` mixtral or qwen3_moe).

    ``copy``: every expert is the FFN (sparse upcycling). ``virtual-groups``: each expert is one of several equal parts
    of the FFN, with its output multiplied by the number of parts. The router scores the parts of one whole alike, so
    that it picks them together. Both keep the function, since the shares of the chosen experts sum to 1. ``drop``:
    copies in which a share ``ratio`` of the neurons starts anew (drop-upcycling). Each copy draws its own neurons, and
    their new values are normal numbers with the mean and deviation of the old ones. It does not keep the function.
    """

    new: Literal["copy", "virtual-groups", "drop"] = "copy"
    ratio: float = Field(default=0.5, gt=0.0, lt=1.0)


class FittedAxis(Settings):
    """Factors per new position of a width axis: one on what is written there, one on how it is read."""

    amplitude: list[float]
    share: list[float]


class FittedOperators(Settings):
    """What tools/fit_growth.py learned, on top of the recipe's own operators (after LiGO, Wang et al., arXiv 2303.00980).

    ``axes`` holds factors of the axes that grow. ``layers`` lists, for each target layer, the source layers whose
    weighted sum its tensors are, with the weights. If it is empty, the layer map applies.
    """

    axes: dict[str, FittedAxis] = Field(default_factory=dict)
    layers: list[dict[int, float]] = Field(default_factory=list)


LearningRate = Annotated[float, Field(ge=0.0)]
Implementation = Literal["transformer_engine", "local"]  # of Megatron-core's modules, as in --transformer-impl
OF_MEGATRON_CORE = ("torch_dist", "torch")  # formats, by their names in --ckpt-format
_MEGATRON_CORE_KEYS = {  # the formats that can have another value than the default
    "learning_rates": OF_MEGATRON_CORE,
    "expert_parallel": ("torch_dist",),
    "transformer_impl": ("torch",),
    "distributed_optimizer": ("torch",),
}


class TargetLayout(ParallelLayout):
    """The layout on disk, and its format.

    ``deepspeed`` is DeepSpeed's own ZeRO files for exactly this layout, with moments. ``universal`` is DeepSpeed's
    folder for every data-parallel size and ZeRO stage, with moments. ``torch_dist`` is Megatron-core's folder for any
    degrees, with moments. ``torch`` is Megatron-LM's older folder for exactly these tensor and pipeline ranks, with
    moments. ``huggingface`` has weights only.

    ``dtype`` is the dtype of the model's own weights; fp32 masters and moments are always fp32. ``auto`` keeps fp32
    for a Hugging Face folder and the source's precision for the others. ``modules`` names the training code that will
    load it: ``transformers`` (also this package's trainer), or ``megatron-deepspeed``. Its vocabulary is padded to a
    multiple of ``vocabulary_multiple`` times tensor_parallel, and so is that of ``torch_dist`` and ``torch``. Under ZeRO-3,
    ``sub_group_size`` must be the one in the engine's zero_optimization section.

    ``learning_rates`` are the run's --lr and --min-lr, for Megatron-core from 0.19 on, which finds the parameter groups
    of a ``torch_dist`` or ``torch`` checkpoint by them. ``expert_parallel`` is the run's --expert-model-parallel-size. It
    decides how many optimizers Megatron-core has for a mixture; tensors are found under any. Of ``torch``, ``transformer_impl``
    is the run's --transformer-impl, which decides the names and the order of parameters, and ``distributed_optimizer`` says
    whether it has --use-distributed-optimizer.
    """

    format: Literal["deepspeed", "universal", "torch_dist", "torch", "huggingface"] = "deepspeed"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    modules: Literal["own", "megatron-deepspeed"] = "own"
    vocabulary_multiple: int = Field(default=128, ge=1)
    sub_group_size: int = Field(default=1_000_000_000, ge=1)
    learning_rates: tuple[LearningRate, LearningRate] | None = Field(default=None, strict=False)
    expert_parallel: int = Field(default=1, ge=1)
    transformer_impl: Implementation = "transformer_engine"
    distributed_optimizer: bool = False

    @model_validator(mode="after")
    def _some_are_megatron_core_s(self) -> Self:
        for key, formats in _MEGATRON_CORE_KEYS.items():
            if self.format not in formats and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} with format: {self.format}; it belongs to {' and '.join(formats)}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _stages_are_known(self) -> Self:
        if self.stages == "balanced":
            raise ValueError(
                "stages: balanced depends on a run's sequence length; state the list, which the run's dry run shows"
            )
        if self.stages != "even" and (self.modules != "own" or self.format == "torch"):
            evenly = "format: torch" if self.format == "torch" else f"modules: {self.modules}"
            raise ValueError(f"stages {list(self.stages)}: {evenly} spreads its layers evenly; remove stages")
        return self

    @model_validator(mode="after")
    def _modules_need_a_pipeline_module(self) -> Self:
        if self.modules != "own" and (self.format in ("huggingface", *OF_MEGATRON_CORE) or self.zero_stage > 1):
            raise ValueError(
                f"modules: {self.modules} with format: {self.format} and zero_stage: {self.zero_stage}; models with these "
                "modules are pipelines; use format: deepspeed or universal with zero_stage: 1"
            )
        return self


class Method(Settings):
    """A published method: where it was published, what it grows, how close ``recipe`` comes, and the recipe's keys."""

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

    ``recipe`` names a published method (methods.yaml). Its keys apply unless the file states them itself.
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
            raise ValueError(f"recipe: {name!r} is not a known method; known: {', '.join(methods())}")
        return merged(methods()[name].recipe, content)
