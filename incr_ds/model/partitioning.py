"""Cuts a model over data-parallel ranks while it is built, as ZeRO-3 does, so that no rank ever holds the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import nn


class Partitioning:
    """Cuts module after module over the data-parallel ranks of ``grid``, by the ``config`` that the engine will have.

    DeepSpeed cuts a model that is whole when the engine starts. These are its own functions, called earlier: the engine takes
    parameters that are cut already as they are.
    """

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, grid: PipelineParallelGrid
    ) -> None:
        self._config, self._dtype, self._device, self._grid = dict(config), dtype, device, grid
        self._first: Any = None

    def cut(self, module: nn.Module) -> None:
        """Keep only this rank's share of the parameters of ``module``. Every rank calls this for the same modules.

        Values are those of the first data-parallel rank. Parameters that are cut already, like a tied weight, stay.
        """
        whole = [parameter for parameter in module.parameters() if not hasattr(parameter, "ds_id")]
        if not whole:
            return
        if self._first is None:
            group = self._grid.get_data_parallel_group()
            deepspeed.zero.Init(
                module=module,
                data_parallel_group=group,
                dtype=self._dtype,
                config_dict_or_path=self._config,
                mpu=self._grid,
            )
            self._first = whole[0]
        else:
            self._first.convert_to_zero_parameters(param_list=whole)
        for buffer in module.buffers():  # the engine moves the buffers of a whole model, but not of one that is cut
            buffer.data = buffer.data.to(self._device)
