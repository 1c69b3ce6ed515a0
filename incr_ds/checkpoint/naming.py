"""Maps parameter names of training codes and other programs to logical (Hugging Face) names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from incr_ds.arch.architecture import Architecture
from incr_ds.errors import CheckpointError
from incr_ds.sharding.joined import joined_parameters
from incr_ds.sharding.placement import names_in_pipelines

# Prefixes of torch.compile, FSDP and activation checkpointing, at any place; DistributedDataParallel's is at the front.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OUTER_WRAPPER = "module"
_ADAPTER = re.compile(r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save)\b")
# Endings in every family that has had them, in some version of transformers.
_BUFFERS = ("rotary_emb.inv_freq",)


def logical_names(parameters: Iterable[str], architecture: Architecture) -> Mapping[str, str]:
    """Map each parameter name of a rank to its logical name; an unknown one maps to itself.

    A plain engine's names are logical, or vary as ``plain_names`` says; a pipeline's are ``names_in_pipelines``.
    """
    parameters = list(parameters)
    in_pipeline = names_in_pipelines(architecture)
    plain = plain_names(parameters, architecture)
    return {parameter: in_pipeline.get(parameter, plain[parameter]) for parameter in parameters}


def plain_names(parameters: Iterable[str], architecture: Architecture) -> Mapping[str, str]:
    """Map the names of a model's state to logical ones. An unknown name, or a second name of a tensor, maps to itself.

    Names may lack the base model's prefix (``h.0.ln_1.weight`` for ``transformer.h.0.ln_1.weight``), as in models saved
    without their head. They may also have components that wrappers add (``_orig_mod``, ``module``).
    """
    prefix = architecture.family.base.partition(".")[0]
    known = {saved: spec.name for spec in architecture.tensors for saved in (spec.saved_name, spec.name)}
    known |= {joined: joined for joined in joined_parameters(architecture)}
    parameters = list(parameters)
    found = {}
    for parameter in parameters:
        bare = _unwrapped(parameter)
        found[parameter] = known.get(bare, known.get(f"{prefix}.{bare}", parameter))
    counts = Counter(found.values())
    return {parameter: name if counts[name] == 1 else parameter for parameter, name in found.items()}


def is_buffer(parameter: str, architecture: Architecture) -> bool:
    """Whether a name is that of a buffer in old checkpoints, which follows from the config."""
    return f".{parameter}".endswith((*architecture.family.buffers, *_BUFFERS))


def refuse_adapters(parameters: Iterable[str], where: str) -> None:
    """Raise CheckpointError if parameters belong to an adapter beside a model."""
    found = next((name for name in parameters if _ADAPTER.search(name)), None)
    if found is not None:
        raise CheckpointError(f"{where}: {found}: {ADAPTER_CURE}")


ADAPTER_CURE = (
    "this is an adapter (LoRA) beside a model, not a model. Merge it first: load both with peft, call merge_and_unload(), "
    "save_pretrained() the result, and grow that."
)


def _unwrapped(parameter: str) -> str:
    parts = [part for part in parameter.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == _OUTER_WRAPPER:
        parts = parts[1:]
    return ".".join(parts)
