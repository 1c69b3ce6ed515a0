"""The row kernels in CUDA C++ for sm_90a (row_kernels.cu, row_arithmetic.cuh), called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from incr_ds.errors import KernelError
from incr_ds.kernels.cuda_library import build_library
from incr_ds.kernels.rows import STATISTICS, Kind, Rows, Tempering

_LOGITS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_KINDS: dict[Kind, int] = {"none": 0, "forward_kl": 1, "reverse_kl": 2, "jsd": 3, "sparse": 4}
_POINTERS = ("student", "teacher", "result", "normalizers", "factors", "labels", "live", "centres",
             "inverse_temperature", "stream")  # fmt: skip
_NUMBERS = ("student_stride", "teacher_stride", "count", "columns", "logits", "kind", "unit", "write")
# Bytes that a lane moves at once. Rows must start at multiples of it.
_ALIGNMENT = 16


class _RowCall(ctypes.Structure):
    """Mirrors RowCall in row_arithmetic.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_longlong) for name in _NUMBERS]


@functools.cache
def open_library(path: Path) -> ctypes.CDLL:
    """Open the library at ``path`` and declare its functions. Raises KernelError if it is not one of ours."""
    library = ctypes.CDLL(str(path))
    for name in ("statistics", "centre", "gradient"):
        getattr(library, f"incr_ds_{name}").argtypes = [ctypes.POINTER(_RowCall)]
    library.incr_ds_error.restype = ctypes.c_char_p
    if library.incr_ds_call_bytes() != ctypes.sizeof(_RowCall):
        raise KernelError(f"{path} was built from different sources; delete it")
    return library


class CudaRows:
    """Row kernels of the ``cuda`` backend; see RowKernels. ``library`` comes from open_library.

    Rows of logits must start at multiples of 16 bytes.
    """

    name = "cuda"
    temporaries = 0

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def logits_dtype(self, operand: torch.dtype) -> torch.dtype:
        """Logits have the dtype of the products' operands."""
        return operand

    def statistics(self, student: Tensor, teacher: Tensor | None, tempering: Tempering) -> Tensor:
        """See RowKernels. Returns [STATISTICS, C]."""
        result = torch.empty((STATISTICS, student.shape[0]), dtype=torch.float32, device=student.device)
        self._run("statistics", _call(student, teacher, result, tempering), student)
        return result

    def centre(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """See RowKernels. Returns [2, C]."""
        result = torch.empty((2, student.shape[0]), dtype=torch.float32, device=student.device)
        call = _call(student, teacher, result, rows.tempering)
        call.normalizers, call.kind = rows.normalizers.data_ptr(), _KINDS[rows.kind]
        self._run("centre", call, student)
        return result

    def gradient(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """See RowKernels. Returns [C]; ``student`` then holds the gradient."""
        result = torch.empty(student.shape[0], dtype=torch.float32, device=student.device)
        call = _call(student, teacher, result, rows.tempering)
        call.normalizers, call.factors = rows.normalizers.data_ptr(), rows.factors.data_ptr()
        call.labels, call.live = rows.label.data_ptr(), rows.live.data_ptr()
        call.centres = None if rows.centre is None else rows.centre.data_ptr()
        call.kind, call.write = _KINDS[rows.kind], rows.write
        self._run("gradient", call, student)
        return result

    def _run(self, name: str, call: _RowCall, student: Tensor) -> None:
        with torch.cuda.device_of(student):
            # CPU tensors are for the same library built for the host, which tests use.
            call.stream = torch.cuda.current_stream().cuda_stream if student.is_cuda else None
            error = getattr(self._library, f"incr_ds_{name}")(ctypes.byref(call))
        if error:
            raise RuntimeError(f"CUDA row kernel {name}: {self._library.incr_ds_error(error).decode()}")


def cuda_rows() -> CudaRows:
    """The kernels of the library for the device. The library is built if needed."""
    return CudaRows(open_library(build_library()))


def _call(student: Tensor, teacher: Tensor | None, result: Tensor, tempering: Tempering) -> _RowCall:
    for logits in (student, teacher):
        if logits is not None and (logits.data_ptr() | logits.stride(0) * logits.itemsize) % _ALIGNMENT:
            raise ValueError(f"rows of logits must start at multiples of {_ALIGNMENT} bytes")
    return _RowCall(
        student=student.data_ptr(),
        teacher=None if teacher is None else teacher.data_ptr(),
        result=result.data_ptr(),
        inverse_temperature=tempering.inverse.data_ptr(),
        student_stride=student.stride(0),
        teacher_stride=0 if teacher is None else teacher.stride(0),
        count=student.shape[0],
        columns=student.shape[1],
        logits=_LOGITS[student.dtype],
        unit=tempering.unit,
    )
