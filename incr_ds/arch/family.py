"""Model families as data: families/*.yaml, read strictly, every key used."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from incr_ds.arch.tensors import Role, Use
from incr_ds.config.fields import Settings, parse_settings, read_yaml
from incr_ds.errors import ConfigError

FOLDER = Path(__file__).parent / "families"

# Fields of every transformers config that do not change what the model computes.
WITHOUT_EFFECT = frozenset(
    "architectures transformers_version dtype torch_dtype use_cache model_type id2label label2id problem_type "
    "output_hidden_states output_attentions return_dict is_encoder_decoder chunk_size_feed_forward _name_or_path "
    "bos_token_id eos_token_id pad_token_id initializer_range _attn_implementation attn_implementation".split()
)


class DimensionDeclaration(Settings):
    """``out heads*head_dim``: a use, and the axes whose sizes multiply."""

    use: Use
    axes: tuple[str, ...]


class TensorDeclaration(Settings):
    """One line of a family file; see families/llama.yaml."""

    name: str
    dims: list[DimensionDeclaration]
    role: Role
    when: str | None = None
    tied_to: str | None = None

    @field_validator("dims", mode="before")
    @classmethod
    def _from_text(cls, lines: Any) -> list[dict[str, Any]]:
        words = [line.split() for line in lines]
        return [{"use": use, "axes": tuple(axes.split("*"))} for use, axes in words]


class ConfigDeclaration(Settings):
    """Which Hugging Face config fields the family knows, and what growth does with them."""

    eps: str
    keeps: list[str]
    per_layer: list[str] = Field(default_factory=list)
    only: dict[str, Any] = Field(default_factory=dict)


class Family(Settings):
    """A model family: its axes (name -> config field), tensors and config fields."""

    model_type: str
    axes: dict[str, str]
    tensors: list[TensorDeclaration]
    config: ConfigDeclaration

    @property
    def known_fields(self) -> frozenset[str]:
        """Config fields that the family understands."""
        fields = {*self.axes.values(), *self.config.keeps, *self.config.per_layer, *self.config.only}
        return WITHOUT_EFFECT | fields


@cache
def families() -> dict[str, Family]:
    """Every family shipped, by model_type."""
    read = (parse_settings(read_yaml(path), Family, str(path)) for path in sorted(FOLDER.glob("*.yaml")))
    return {family.model_type: family for family in read}


def family_of(model_type: Any, where: str) -> Family:
    """The family of a config's model_type; ConfigError with the known ones otherwise."""
    known = families()
    if model_type not in known:
        raise ConfigError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(known)}. "
            "A family is one YAML file in incr_ds/arch/families."
        )
    return known[model_type]
