"""A concrete model: a family with its sizes, and every tensor that follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from incr_ds.arch.config_reads import changes_nothing, installed_version, reads_of
from incr_ds.arch.family import Family, TensorDeclaration, family_of
from incr_ds.arch.tensors import Dimension, TensorSpec
from incr_ds.config.json_file import read_json
from incr_ds.errors import ConfigError

# A plan holds every position of an axis and names every tensor. Above these sizes the config is damaged or mistyped.
_MOST = {"layers": 1 << 14, "experts": 1 << 12}
_MOST_POSITIONS = 1 << 22


def max_axis_size(axis: str) -> int:
    """The largest plausible size of an axis."""
    return _MOST.get(axis, _MOST_POSITIONS)


@dataclass(frozen=True)
class Architecture:
    """A family, its full Hugging Face config, and the size of every named axis.

    ``stated`` is the config as in its file: without transformers' defaults, and with fields that it does not read.
    """

    family: Family
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    stated: Mapping[str, Any]

    @property
    def unread(self) -> tuple[str, ...]:
        """Config fields that none of the model's code reads."""
        return tuple(sorted(set(self.stated) - self.family.known_fields))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the config."""
        checks = [
            (
                bool(self.unread),
                f"config.json: {', '.join(self.unread)}: transformers {installed_version()} does not read this for a "
                f"{self.family.model_type}, so it has no effect; it is copied unchanged",
            ),
            (
                bool(self.stated.get("auto_map")),
                f"config.json: auto_map names code that comes with the checkpoint; it is not run: the model is transformers' own "
                f"{self.family.class_name}",
            ),
        ]
        return tuple(text for applies, text in checks if applies)

    @property
    def tied(self) -> bool:
        """True if the output head shares the embedding's storage."""
        return bool(self.config["tie_word_embeddings"])

    @property
    def logit_softcap(self) -> float | None:
        """The c in logits c tanh(z / c) (the soft cap), or None if the logits are the product z itself."""
        field = self.family.logit_softcap
        cap = None if field is None else self.config[field]
        return None if cap is None else float(cap)

    @property
    def logit_factor(self) -> float:
        """The factor on the product of hidden states and output head."""
        over, under = self.family.logit_multiplier, self.family.logit_divisor
        return (float(self.config[over]) if over else 1.0) / (float(self.config[under]) if under else 1.0)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.sizes["layers"]

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor in the order of the module's parameters. A tied alias is listed too, with ``tied_to`` set."""
        specs: list[TensorSpec] = []
        present = [item for item in self.family.tensors if item.when is None or self.config.get(item.when)]
        in_layers = [item for item in present if "{layer}" in item.name]
        first = present.index(in_layers[0])
        specs += [self._spec(item, None) for item in present[:first]]
        specs += [spec for layer in range(self.num_layers) for spec in self._layer(in_layers, layer)]
        specs += [self._spec(item, None) for item in present[first + len(in_layers) :]]
        return tuple(specs)

    @cached_property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensors that have their own storage."""
        return tuple(spec for spec in self.tensors if spec.tied_to is None)

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name, tied aliases included."""
        return {spec.name: spec for spec in self.tensors}

    @property
    def num_parameters(self) -> int:
        """Number of stored elements."""
        return sum(spec.numel for spec in self.stored)

    @property
    def active_parameters(self) -> int:
        """Stored elements that one token uses: of a mixture's experts, only as many as the router picks."""
        return sum(spec.numel for spec in self.stored if self.is_active(spec))

    @property
    def active_experts(self) -> int:
        """Experts of a layer that one token uses; 0 for a dense model."""
        return int(self.config["num_experts_per_tok"]) if "experts" in self.sizes else 0

    def is_active(self, spec: TensorSpec) -> bool:
        """Whether ``spec`` counts for one token. Experts have equal sizes, so the first ones stand for those that it uses."""
        return spec.expert is None or spec.expert < self.active_experts

    def _layer(self, items: list[TensorDeclaration], layer: int) -> Iterator[TensorSpec]:
        """The tensors of one layer. Those of a mixture's experts come expert by expert."""
        for several, group in groupby(items, key=lambda item: "{expert}" in item.name):
            members = list(group)
            for expert in range(self.sizes["experts"]) if several else (None,):
                yield from (self._spec(item, layer, expert) for item in members)

    def _spec(self, item: TensorDeclaration, layer: int | None, expert: int | None = None) -> TensorSpec:
        template, _, inside = item.name.partition("{layer}.")
        inside = inside.format(expert=expert)
        local_name = inside if layer is not None else template.removeprefix(f"{self.family.base}.")
        dims = tuple(Dimension(dim.use, dim.parts, sum(map(self._size, dim.parts))) for dim in item.dims)
        tied_to = item.tied_to if self.tied else None
        name = item.name.format(layer=layer, expert=expert)
        origin = item.grown_from and item.grown_from.format(layer=layer)
        saved_as = item.saved_as and item.saved_as.format(layer=layer)
        return TensorSpec(
            name, local_name, layer, dims, item.role, tied_to, float(item.offset), saved_as, expert, origin
        )

    def _size(self, part: tuple[str, ...]) -> int:
        return math.prod(int(axis) if axis.isdigit() else self.sizes[axis] for axis in part)


def read_config(path: Path) -> dict[str, Any]:
    """Read a Hugging Face config.json. Raises ConfigError if it is missing or not a JSON object."""
    hint = (
        ". The architecture comes from the Hugging Face config.json in the checkpoint folder; copy it there or name one with "
        "--config FILE."
    )
    return read_json(path, ConfigError, hint)


def architecture_from_config(config: Mapping[str, Any], where: str) -> Architecture:
    """Build the architecture that a Hugging Face config describes.

    transformers fills in defaults and validates. Raises ConfigError for an unsupported family, an unknown field, a
    field with an unsupported value, and everything that transformers refuses. ``where`` names the config's origin.
    """
    family = _known_family(config, where)
    return _architecture(family, filled_config(config, where), config, where)


def saved_architecture(path: Path) -> Architecture:
    """Build the architecture of a checkpoint's config.json.

    A config that has every field of its family, as transformers and this package write it, is used as it is. Starting
    transformers takes seconds and would add nothing to it. Raises ConfigError as ``architecture_from_config`` does.
    """
    config, where = read_config(path), str(path)
    family = _known_family(config, where)
    needed = family.effective_fields | {family.config.initializer}
    complete = needed <= set(config) and not set(family.config.older) & set(config)
    return _architecture(family, config if complete else filled_config(config, where), config, where)


def check_context(architecture: Architecture, length: int, where: str) -> None:
    """Raise ConfigError if the learned positions end before ``length`` tokens. ``where`` names what asks for them."""
    most = architecture.sizes.get("positions")
    if most is not None and length > most:
        raise ConfigError(
            f"{where}: {length} tokens per sample, but this {architecture.family.model_type} has {most} learned positions "
            f"({architecture.family.axes['positions']}); use at most {most}."
        )


def _known_family(config: Mapping[str, Any], where: str) -> Family:
    """Find the family, and refuse config fields that it does not know and that can change what the model computes."""
    family = family_of(config.get("model_type"), where)
    _refuse_quantized(config, where)
    unknown = [
        name
        for name in sorted(set(config) - family.known_fields)
        if not changes_nothing(name, config[name], family.module)
    ]
    if unknown:
        files = sorted({read.file for name in unknown for read in reads_of(name, family.module)})
        raise ConfigError(
            f"{where}: {', '.join(f'{name} ({json.dumps(config[name])[:40]})' for name in unknown)}: transformers "
            f"{installed_version()} reads this for a {family.model_type} ({', '.join(files)}), and no family file says what "
            "growth must do with it; nothing was done. If the model works without it, pass a config.json without it with "
            f"--config FILE; otherwise declare it in incr_ds/arch/families/{family.model_type}.yaml."
        )
    return family


def _refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(
            f"{where}: quantization_config{f' ({method})' if method else ''}: the weights are quantized, and only plain "
            "floating-point weights can be grown. Use the unquantized release of this model, or load it with transformers, "
            "call model.dequantize() and save it."
        )


def _architecture(family: Family, full: Mapping[str, Any], stated: Mapping[str, Any], where: str) -> Architecture:
    for name, value in {**family.config.only, **family.config.foreign}.items():
        if full.get(name, value) != value:
            raise ConfigError(
                f"{where}: {name} is {full[name]!r}; {family.model_type} is supported with {value!r} only."
            )
    sizes = axis_sizes(family, full, where)
    for field, axis in family.config.follows.items():
        if full[field] != sizes[axis]:
            raise ConfigError(
                f"{where}: {field} is {full[field]}; {family.model_type} is supported only with the value of "
                f"{family.axes[axis]}, {sizes[axis]}."
            )
    _check_heads(sizes, where)
    _check_numbers(family, full, where)
    return Architecture(family, full, sizes, stated)


def _check_numbers(family: Family, full: Mapping[str, Any], where: str) -> None:
    """Check eps and the rotary frequencies, with which growth computes."""
    rope = full.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{where}: rope_parameters: expected a mapping, found {rope!r}.")
    found = {f"rope_parameters.{key}": value for key, value in rope.items() if key == "rope_theta"}
    for kind, inner in rope.items():  # some families state them per kind of layer
        if isinstance(inner, dict) and "rope_theta" in inner:
            found[f"rope_parameters.{kind}.rope_theta"] = inner["rope_theta"]
    if family.config.eps is not None:
        found[family.config.eps] = full.get(family.config.eps)
    for field, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ConfigError(f"{where}: {field}: expected a positive number, found {value!r}.")


def axis_sizes(family: Family, full: Mapping[str, Any], where: str) -> dict[str, int]:
    """The size of every axis: its config field, or the family's rule if the config has none."""
    stated = {axis: (field, full[field]) for axis, field in family.axes.items() if full.get(field) is not None}
    for axis, (field, value) in stated.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where}: {field}: expected a positive whole number, found {value!r}.")
        if value > max_axis_size(axis):
            raise ConfigError(
                f"{where}: {field}: {value} is above {max_axis_size(axis)}, more than any model has; the file is damaged."
            )
    sizes = {axis: value for axis, (_, value) in stated.items()}
    if missing := [field for axis, field in family.axes.items() if axis not in sizes and axis not in family.derived]:
        raise ConfigError(f"{where}: {missing[0]}: missing; a {family.model_type} config must state it.")
    for axis, rule in family.derived.items():
        if axis not in sizes:
            sizes[axis] = _derive(rule, sizes, where)
    return sizes


def _derive(rule: str, sizes: Mapping[str, int], where: str) -> int:
    over, _, under = rule.partition("/")
    size = math.prod(int(word) if word.isdigit() else sizes[word] for word in over.split("*"))
    if under and size % sizes[under]:
        raise ConfigError(f"{where}: {over} {size} is not a multiple of {under} {sizes[under]}.")
    return size // sizes[under] if under else size


def filled_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Add every default of transformers to ``config``. Raises ConfigError for what transformers refuses."""
    from transformers import AutoConfig

    _check_dtype(config, where)
    # transformers modifies the mappings that it is given.
    given = {key: deepcopy(value) for key, value in config.items() if key != "model_type"}
    try:
        filled = AutoConfig.for_model(config["model_type"], **given).to_dict()
    except Exception as error:  # its checks raise many kinds of errors, and values that it does not check any other one
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise ConfigError(f"{where}: transformers refuses this {config['model_type']} config: {reason}") from error
    return {key: value for key, value in filled.items() if key in config or key not in ("id2label", "label2id")}


def _check_dtype(config: Mapping[str, Any], where: str) -> None:
    """transformers looks for the name among everything that torch contains."""
    import torch

    for key in ("dtype", "torch_dtype"):
        name = config.get(key)
        if name is not None and not isinstance(getattr(torch, str(name), None), torch.dtype):
            raise ConfigError(f"{where}: {key} {name!r:.80}: expected the name of a torch dtype, like bfloat16.")


def _check_heads(sizes: Mapping[str, int], where: str) -> None:
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    if heads % kv_heads:
        fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        lower = heads // kv_heads * kv_heads
        near = " or ".join(str(count) for count in (lower, lower + kv_heads) if count)
        raise ConfigError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; with {kv_heads} kv "
            f"heads, num_attention_heads can be {near}; with {heads} query heads, num_key_value_heads can be {fitting}."
        )
