"""Reshards a torch_dist checkpoint with torch alone: every rank loads its share with torch.distributed.checkpoint, and saves it.

    python -m incr_ds.testing.torch_resharding SOURCE OUTPUT

Under torch.distributed.run, the ranks are tensor ranks. Alone, the process loads and saves everything.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, zeros

# The dimension of the stacked parameters that tensor ranks cut; whatever else there is, each of them has whole.
CUTS = {
    "self_attention.linear_qkv.weight": 1,
    "self_attention.linear_proj.weight": 2,
    "mlp.linear_fc1.weight": 1,
    "mlp.linear_fc2.weight": 2,
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
}
ALIAS = "optimizer.state.fp32_param."  # keys of this package's checkpoints for bytes that have another key


def reshard(source: str, output: str, mesh: DeviceMesh | None) -> None:
    """Load every tensor, in ``mesh`` this rank's share of it, and save it below ``output``."""
    described = FileSystemReader(source).read_metadata().state_dict_metadata
    tensors = {key: _empty(key, entry, mesh) for key, entry in described.items() if not key.startswith(ALIAS)}
    held = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        load(held, checkpoint_id=source, no_dist=mesh is None)
        save(held, checkpoint_id=output, no_dist=mesh is None)


def _empty(key: str, entry: object, mesh: DeviceMesh | None) -> torch.Tensor | None:
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if mesh is None:
        return torch.zeros(entry.size, dtype=entry.properties.dtype)
    cut = next((dimension for end, dimension in CUTS.items() if key.endswith(end)), None)
    placement = Replicate() if cut is None else Shard(cut)
    return zeros(entry.size, dtype=entry.properties.dtype, device_mesh=mesh, placements=[placement])


def main(words: list[str], environment: Mapping[str, str]) -> None:
    """Reshard as the command line says."""
    source, output = words
    if "WORLD_SIZE" not in environment:
        return reshard(source, output, None)
    dist.init_process_group("gloo")
    reshard(source, output, init_device_mesh("cpu", (dist.get_world_size(),)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
