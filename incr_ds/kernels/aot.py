"""Compiles every Triton row kernel ahead of time, without the GPU, and reads the resources that its machine code uses.

    python -m incr_ds.kernels.aot [bf16] [fp16] [fp32]

prints one JSON object per kernel variant, for the named dtypes of logits or for all.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from incr_ds.kernels import triton_rows
from incr_ds.kernels.triton_rows import GRADIENT_LAUNCH, STATISTICS_LAUNCH, RowLaunch

HOPPER = 90
LOGITS = ("bf16", "fp16", "fp32")

_POINTERS = {
    "result": "*fp32",
    "normalizers": "*fp32",
    "factors": "*fp32",
    "labels": "*i64",
    "live": "*u8",
    "centres": "*fp32",
}
_SIZES = {"student_stride": "i32", "teacher_stride": "i32", "count": "i32", "columns": "i32"}


@dataclass(frozen=True)
class KernelUsage:
    """One compiled variant: registers per thread, bytes of stack (spills) per thread, and shared memory per program."""

    kernel: str
    logits: str
    constants: str
    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class _Variant:
    kernel: str
    launch: RowLaunch
    logits: str
    constants: Mapping[str, int | bool]


def compile_row_kernels(logits: Sequence[str] = LOGITS, capability: int = HOPPER) -> Iterator[KernelUsage]:
    """Compile every variant that the loss launches on ``logits``. ``capability`` is NVIDIA's compute capability times 10.

    Raises RuntimeError if Triton interprets instead of compiling (TRITON_INTERPRET=1).
    """
    if triton_rows.INTERPRETED:
        raise RuntimeError("Triton interprets its kernels in this process; unset TRITON_INTERPRET to compile them")
    for variant in _variants(logits):
        yield _compile(variant, capability)


def _variants(kinds: Sequence[str]) -> Iterator[_Variant]:
    for logits in kinds:
        for unit in (True, False):
            for teacher in (True, False):
                constants = {"HAS_TEACHER": teacher, "UNIT": unit}
                yield _Variant("statistics_kernel", STATISTICS_LAUNCH, logits, constants)
            for kind in (2, 3):
                yield _Variant("centre_kernel", GRADIENT_LAUNCH, logits, {"KIND": kind, "UNIT": unit})
            for kind in range(5):
                yield _Variant("gradient_kernel", GRADIENT_LAUNCH, logits, {"KIND": kind, "UNIT": unit, "WRITE": True})


def _compile(variant: _Variant, capability: int) -> KernelUsage:
    function = getattr(triton_rows, variant.kernel)
    constants = {**variant.constants, "BLOCK": variant.launch.block}
    types = {"student": f"*{variant.logits}", "teacher": f"*{variant.logits}", "inverse_temperature": "*fp32"}
    types |= _POINTERS | _SIZES
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if name in ("student", "teacher", "student_stride", "teacher_stride")
    }
    source = ASTSource(function, signature=signature, constexprs=positions, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": variant.launch.warps, "enable_fp_fusion": True}
    )
    registers, stack = _usage(compiled.asm["cubin"])
    described = ", ".join(f"{name}={value}" for name, value in variant.constants.items())
    return KernelUsage(variant.kernel, variant.logits, described, registers, stack, int(compiled.metadata.shared))


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in ``cubin``, from the cuobjdump that comes with Triton."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found: Any = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    for usage in compile_row_kernels(sys.argv[1:] or LOGITS):
        print(json.dumps(asdict(usage)), flush=True)
