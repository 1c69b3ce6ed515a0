"""Times variants in turns, so that a drifting clock affects all of them."""

from __future__ import annotations

import gc
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

from incr_ds.bench.variants import Step, Variant, make_problem
from incr_ds.losses.planner import LossShape

WARM_UP = 2
COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One variant at one shape: median milliseconds, or the reason why there are none.

    ``extra_bytes`` (CUDA only) is the peak memory of a pass beyond what was in use before it and beyond the
    ``gradient_bytes`` that it returns.
    """

    variant: str
    kind: str
    computes: str
    tokens: int
    vocabulary: int
    milliseconds: float | None
    extra_bytes: int | None
    gradient_bytes: int | None
    repeats: int
    absent: str | None = None


def measure_shape(
    shape: LossShape, variants: Sequence[Variant], repeats: int, dtype: torch.dtype, device: torch.device
) -> list[Measurement]:
    """Median time of ``repeats`` forward and backward passes of each variant, one of each per round."""
    problem = make_problem(shape, dtype, device)
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    memory: dict[str, tuple[int | None, int]] = {}
    for variant in variants:
        try:
            step = variant.make(problem)
            memory[variant.name] = pass_memory(step, device)
            for _ in range(WARM_UP - 1):
                step()
            steps[variant.name] = step
        except ImportError as error:
            absent[variant.name] = f"not available: {error}"
        except torch.cuda.OutOfMemoryError:
            absent[variant.name] = "out of memory"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device))
    return [
        Measurement(
            variant=variant.name,
            kind=variant.kind,
            computes=variant.computes,
            tokens=shape.tokens,
            vocabulary=shape.vocabulary,
            milliseconds=median(times[variant.name]) if variant.name in times else None,
            extra_bytes=memory[variant.name][0] if variant.name in times else None,
            gradient_bytes=memory[variant.name][1] if variant.name in times else None,
            repeats=repeats,
            absent=absent.get(variant.name),
        )
        for variant in variants
    ]


def measure_grid(
    shapes: Sequence[LossShape],
    variants: Sequence[Variant],
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> Iterator[list[Measurement]]:
    """Yield the measurements of one shape after the other. Starts none after ``seconds``."""
    end = time.monotonic() + seconds
    for shape in shapes:
        if time.monotonic() > end:
            _log.warning("no time left for N=%d V=%d", shape.tokens, shape.vocabulary)
            continue
        yield measure_shape(shape, variants, repeats, dtype, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """GB/s of a large copy, counting both reading and writing."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(milliseconds(lambda: _copy(target, source), device) for _ in range(repeats))
    return 2 * source.numel() / best / 1e6


def machine(device: torch.device) -> dict[str, str]:
    """The machine and software of the measurements."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    found = {"device": name, "threads": str(torch.get_num_threads()), "python": platform.python_version()}
    for package in ("torch", "triton", "liger-kernel", "trl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def pass_memory(step: Step, device: torch.device) -> tuple[int | None, int]:
    """(extra, gradient) bytes of one pass; see Measurement."""
    if device.type != "cuda":
        return None, step()
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    gradients = step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - gradients, gradients


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Time of one call; on a CUDA device by the device's clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
