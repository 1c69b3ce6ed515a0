"""Lets several ranks share each sample: every rank has an equal slice of its tokens, and in attention a part of the heads.

DeepSpeed's Ulysses exchanges the two: before attention the ranks swap slices of all heads for whole sequences of some
heads, and back after it. Everything else in a layer works on tokens one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from incr_ds.arch.architecture import Architecture


@dataclass(frozen=True)
class SequenceRanks:
    """This rank's position among the ranks that share its samples. ``group`` is None for a single rank."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1


ONE_RANK = SequenceRanks()


def sequence_ranks(size: int) -> SequenceRanks:
    """Join the ranks of the world in groups of ``size`` consecutive ones. All ranks must call this."""
    if size == 1:
        return ONE_RANK
    group, _ = dist.new_subgroups(group_size=size)
    return SequenceRanks(group, dist.get_rank() % size, size)


def shared_attention(architecture: Architecture, ranks: SequenceRanks) -> str:
    """Register the attention of a model whose samples ``ranks`` share, under a name that transformers' config may have."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sizes = architecture.sizes
    heads = (sizes["heads"], sizes["kv_heads"], sizes["head_dim"])
    name = f"ulysses_{'x'.join(map(str, heads))}"
    ALL_ATTENTION_FUNCTIONS.register(name, _attention(*heads, architecture.num_layers, ranks))
    return name


def _attention(heads: int, kv_heads: int, head_dim: int, layers: int, ranks: SequenceRanks) -> Callable[..., Any]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    exchanges: dict[int, Any] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
    ) -> Any:
        """[B, heads, S / size, D] -> [B, S / size, heads * D]; ``mask`` is that of whole sequences."""
        batch_size, length = query.shape[0], query.shape[2]
        if batch_size not in exchanges:
            exchanges[batch_size] = UlyssesSPAttentionHF(
                sdpa_attention_forward,
                batch_size=batch_size,
                attn_head_count=heads,
                attn_head_size=head_dim,
                kv_head_count=kv_heads,
                num_hidden_layers=layers,
                process_group=ranks.group,
                seq_length_is_variable=True,
            )
        # Ulysses gathers positions for kernels that find documents by them. sdpa finds them in the mask.
        arguments["position_ids"] = torch.arange(length, device=query.device)[None]
        return exchanges[batch_size](module, query, key, value, mask, **arguments)

    return attention
