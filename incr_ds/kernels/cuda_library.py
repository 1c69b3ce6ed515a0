"""The CUDA row kernels as a shared library, built with nvcc on first use and kept in a cache folder.

The library exports C functions, takes raw pointers and a stream, and includes CUDA's runtime. So one file works with
every version of torch and can be loaded on a machine without a GPU.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from incr_ds.errors import KernelError

CAPABILITY = (9, 0)
FOLDER = Path(__file__).parent
SOURCE = FOLDER / "row_kernels.cu"
INCLUDED = (FOLDER / "row_interface.cuh", FOLDER / "row_arithmetic.cuh")
# sm_90a by -gencode: the shorthand -arch=sm_90a also compiles for plain sm_90. Fused multiply-adds are explicit in the sources.
OPTIONS = (
    "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-fmad=false", "-shared", "-Xcompiler=-fPIC",
    "-cudart=static", "-Xptxas=-v",
)  # fmt: skip

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where built libraries are kept: INCR_DS_CACHE, otherwise ``incr_ds`` in XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("INCR_DS_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "incr_ds"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, otherwise the one on PATH, otherwise None."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def library_path() -> Path:
    """The file that these sources are built into. Different sources or options give a different file."""
    return cache_folder() / f"row_kernels_{_fingerprint()}.so"


def build_library() -> Path:
    """Build the library if needed. A .txt file beside it holds what ptxas reports about each kernel.

    Any number of processes may call this at once: one compiles while the others wait. Raises KernelError if there is no
    nvcc, or with nvcc's output if it fails.
    """
    library = library_path()
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with _locked(library.with_suffix(".lock")):
        if not library.exists():
            _compile(library)
    return library


@functools.cache
def _fingerprint() -> str:
    digest = hashlib.sha256("\n".join(OPTIONS).encode())
    for path in (SOURCE, *INCLUDED):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``. The system releases it when the process ends for any reason."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(library: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise KernelError(f"{library.name} must be built, but there is no nvcc in CUDA_HOME or on PATH; install CUDA")
    _log.info("building the CUDA row kernels with %s into %s", nvcc, library)
    # The library gets its final name only when it is complete.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        command = [nvcc, *OPTIONS, "-o", str(unfinished), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not unfinished.exists():
            raise KernelError(
                f"nvcc failed with status {done.returncode} and did not build the CUDA row kernels; the command was\n"
                f"  {shlex.join(command)}\nand its output was\n{(done.stderr + done.stdout)[-4000:]}\n"
                "sm_90a needs CUDA 12 or newer; backend 'triton' needs no nvcc."
            )
        library.with_suffix(".txt").write_text(done.stdout + done.stderr)
        os.replace(unfinished, library)
