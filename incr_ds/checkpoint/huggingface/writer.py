"""Writes a Hugging Face folder: safetensors shards, index and config.json, as ``save_pretrained`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec
from incr_ds.checkpoint.sink import Sink
from incr_ds.checkpoint.streaming import Slices, StreamedTensor, slice_of, tensor_bytes, whole

SHARD_BYTES = 2 << 30
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class SafetensorsFile:
    """One shard: its name and the tensors in it."""

    path: str
    specs: tuple[TensorSpec, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[StreamedTensor, ...]:
        """The shard's weights."""
        return tuple(slice_of(spec.name, "weight", whole(spec.shape), self.dtype) for spec in self.specs)

    def write(self, sink: Sink, slices: Slices) -> None:
        """Write the shard: the length of the header, the header, and the tensors in its order (safetensors 1)."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec, tensor in zip(self.specs, self.tensors, strict=True):
            offsets = [position, position + tensor.num_bytes]
            header[spec.saved_name] = {"dtype": DTYPES[self.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            position = offsets[1]
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        sink.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in self.tensors:
            for data, label in slices.data(tensor):
                sink.write(data, label)


def huggingface_files(
    architecture: Architecture, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> tuple[SafetensorsFile, ...]:
    """Plan the shards of a model: tensors in order, and a new shard before one would exceed ``shard_bytes``."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in architecture.stored:
        added = spec.numel * dtype.itemsize
        if shards[-1] and size + added > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += added
    if len(shards) == 1:
        return (SafetensorsFile("model.safetensors", tuple(shards[0]), dtype),)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    return tuple(SafetensorsFile(name, tuple(shard), dtype) for name, shard in zip(names, shards, strict=True))


def index_text(files: tuple[SafetensorsFile, ...]) -> str | None:
    """Content of model.safetensors.index.json, or None for a single shard."""
    if len(files) == 1:
        return None
    weight_map = {spec.saved_name: file.path for file in files for spec in file.specs}
    total = sum(tensor_bytes(file) for file in files)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def config_text(architecture: Architecture, dtype: torch.dtype) -> str:
    """Content of config.json beside DeepSpeed's files.

    It has every field of the architecture, so that reading it does not need transformers, and its class name and dtype.
    """
    unread = {name: architecture.stated[name] for name in architecture.unread}
    return _json_of({**unread, **architecture.config}, architecture, dtype)


def published_config_text(architecture: Architecture, dtype: torch.dtype) -> str:
    """Content of config.json in a Hugging Face folder: the source's, with what changed."""
    return _json_of(architecture.stated, architecture, dtype)


def _json_of(fields: Mapping[str, Any], architecture: Architecture, dtype: torch.dtype) -> str:
    spelling = "torch_dtype" if "torch_dtype" in fields and "dtype" not in fields else "dtype"
    config = {key: value for key, value in fields.items() if key != "_name_or_path"}
    config |= {"architectures": [architecture.family.class_name], spelling: str(dtype).removeprefix("torch.")}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
