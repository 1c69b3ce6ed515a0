"""States the hardware's peak, for MFU. incr_ds.arch.flops counts operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Dense bf16 operations per second of one device, from its vendor's data sheet. The first name contained in its name counts.
KNOWN_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "L4": 121e12,
}


@dataclass(frozen=True)
class Peak:
    """Operations per second of one process's device, and where the number comes from."""

    flops_per_second: float
    origin: str


def device_peak(stated: float | None) -> Peak | None:
    """The peak of this process's device: the run file's, otherwise by the GPU's name, or None if it is unknown.

    A CPU has no peak here: a matrix product measured 17 to 422 GFLOP/s in four starts on one machine.
    """
    if stated is not None:
        return Peak(stated, "peak_flops of the run file")
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = next((peak for part, peak in KNOWN_PEAKS.items() if part in name), None)
    return None if known is None else Peak(known, f"data sheet of {name}, dense bf16")
