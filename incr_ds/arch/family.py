"""Model families as data: families/*.yaml, parsed strictly so that every key is used."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from incr_ds.arch.tensors import Role, Use
from incr_ds.config.fields import Settings, parse_settings
from incr_ds.config.yaml_file import read_yaml
from incr_ds.errors import ConfigError

FOLDER = Path(__file__).parent / "families"
MIXTURES = FOLDER / "mixtures"

# Fields of every transformers config that do not change what the model computes.
WITHOUT_EFFECT = frozenset(
    "architectures transformers_version dtype torch_dtype use_cache model_type id2label label2id problem_type "
    "output_hidden_states output_attentions return_dict is_encoder_decoder chunk_size_feed_forward _name_or_path "
    "bos_token_id eos_token_id pad_token_id sep_token_id initializer_range initializer_factor init_std loss_type "
    "gradient_checkpointing num_labels auto_map name_or_path _commit_hash _attn_implementation attn_implementation".split()
)


class DimensionDeclaration(Settings):
    """One dimension, like ``out heads*head_dim``: a use, and products of axes or numbers, joined by + if concatenated."""

    use: Use
    parts: tuple[tuple[str, ...], ...]


class TensorDeclaration(Settings):
    """One line of a family file; see families/llama.yaml."""

    name: str
    dims: list[DimensionDeclaration]
    role: Role
    when: str | None = None
    tied_to: str | None = None
    offset: int = 0
    saved_as: str | None = None
    grown_from: str | None = None

    @field_validator("dims", mode="before")
    @classmethod
    def _from_text(cls, lines: Any) -> list[dict[str, Any]]:
        words = [line.split() for line in lines]
        return [{"use": use, "parts": tuple(tuple(part.split("*")) for part in size.split("+"))} for use, size in words]


class ConfigDeclaration(Settings):
    """Which Hugging Face config fields the family knows, and what growth does with them.

    ``eps`` names the norms' eps (None: not in the config) and ``initializer`` the standard deviation of fresh weights.
    ``keeps`` stay as they are, ``per_layer`` lists follow the layer map, ``follows`` equal an axis' size, ``only`` are
    supported at one value, and ``without_effect`` change nothing for a causal language model. ``older`` are fields of
    older versions of transformers, which newer ones translate into others. ``foreign`` are fields of other libraries that
    transformers does not read. Only values that match what transformers computes are accepted.
    """

    eps: str | None
    initializer: str = "initializer_range"
    keeps: list[str]
    older: list[str] = Field(default_factory=list)
    per_layer: list[str] = Field(default_factory=list)
    follows: dict[str, str] = Field(default_factory=dict)
    only: dict[str, Any] = Field(default_factory=dict)
    foreign: dict[str, Any] = Field(default_factory=dict)
    without_effect: list[str] = Field(default_factory=list)


class DenseOrigin(Settings):
    """A dense family that a mixture is made from, and those of its config fields that the mixture lacks.

    ``only`` fields are supported at one value each; ``without_effect`` fields do not matter.
    """

    only: dict[str, Any] = Field(default_factory=dict)
    without_effect: list[str] = Field(default_factory=list)


class Family(Settings):
    """A model family: its axes (name -> config field), tensors and config fields.

    Axes: ``derived`` gives a rule for axes that the config leaves out, a product or quotient like ``hidden/heads``.
    ``equal_copies`` are axes that keep the function only if all units are copied equally often. ``under_norm`` are axes
    with one norm over all units that only this norm reads. ``norm`` is the kind of norm on the residual stream.

    Names: ``buffers`` are endings of names that old checkpoints hold and that follow from the config. ``class_name`` is
    transformers' causal language model, as in config.json. ``folder`` is its folder below transformers' models/, if that
    is not its model_type. ``joined`` are parameters of transformers' modules that hold tensors of all experts.
    ``upcycles`` are the dense families that a mixture of experts is made from.

    Training: ``training_supported`` says that this package builds the family's modules and cuts them into pipeline
    stages. ``uncut`` is the reason why it does not cut them over tensor ranks, if so. ``training_requires`` are values
    that config fields must have for training.

    Numbers, each named by its config field: ``embedding_dropout`` and ``embedding_multiplier`` apply to the embedding's
    output, ``embedding_scale`` says how that output is scaled, ``logit_softcap`` is the cap on the logits,
    ``logit_multiplier`` or ``logit_divisor`` their factor, and ``scores_scale`` sets the scale of attention scores if the
    head's size does not. ``fresh_writers: scaled`` divides the deviation of fresh writers by sqrt(2 layers).
    """

    model_type: str
    class_name: str
    folder: str | None = None
    training_supported: bool = False
    uncut: str | None = None
    training_requires: dict[str, Any] = Field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    embedding_scale: Literal["sqrt-hidden"] | None = None
    scores_scale: str | None = None
    embedding_dropout: str | None = None
    embedding_multiplier: str | None = None
    logit_softcap: str | None = None
    logit_multiplier: str | None = None
    logit_divisor: str | None = None
    fresh_writers: Literal["scaled"] | None = None
    equal_copies: list[str] = Field(default_factory=list)
    under_norm: list[str] = Field(default_factory=list)
    axes: dict[str, str]
    derived: dict[str, str] = Field(default_factory=dict)
    upcycles: dict[str, DenseOrigin] = Field(default_factory=dict)
    joined: dict[str, list[str]] = Field(default_factory=dict)
    buffers: list[str] = Field(default_factory=list)
    tensors: list[TensorDeclaration]
    config: ConfigDeclaration

    @property
    def layers_path(self) -> str:
        """Where transformers' causal language model keeps its decoder layers."""
        return next(item.name for item in self.tensors if "{layer}" in item.name).partition(".{layer}")[0]

    @property
    def base(self) -> str:
        """The module that holds the layers, the embedding and the final norm."""
        return self.layers_path.rpartition(".")[0]

    @property
    def known_fields(self) -> frozenset[str]:
        """Config fields that the family understands."""
        return self.without_effect | self.effective_fields | set(self.config.older) | set(self.config.foreign)

    @property
    def module(self) -> str:
        """The folder in transformers' models that holds the family's code."""
        return self.folder or self.model_type

    @property
    def effective_fields(self) -> frozenset[str]:
        """Config fields that change what the model computes, by their names in today's transformers."""
        config = self.config
        return frozenset({*self.axes.values(), *config.keeps, *config.per_layer, *config.only, *config.follows})

    @property
    def without_effect(self) -> frozenset[str]:
        """Config fields that do not change what the model computes."""
        return WITHOUT_EFFECT | set(self.config.without_effect)


@cache
def _shipped() -> dict[str, Path]:
    """Path of every family file by model_type, which is the file's name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


@cache
def _read(path: Path) -> Family:
    return parse_settings(read_yaml(path), Family, str(path))


@cache
def _mixtures() -> dict[str, Path]:
    return {path.stem: path for path in sorted(MIXTURES.glob("*.yaml"))}


def families() -> dict[str, Family]:
    """Every dense family shipped, by model_type."""
    return {name: _read(path) for name, path in _shipped().items()}


def mixtures() -> dict[str, Family]:
    """Every family of mixtures of experts, by model_type. Dense models can be grown into them."""
    return {name: _read(path) for name, path in _mixtures().items()}


def family_of(model_type: Any, where: str) -> Family:
    """The family of a config's model_type. Raises ConfigError that lists the known ones if there is none."""
    known = {**_shipped(), **_mixtures()}
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(known)}. "
            "A family is one YAML file in incr_ds/arch/families."
        )
    return _read(known[model_type])
