"""The CUDA row kernels as a shared library: built with nvcc when it is first asked for, and kept in a cache folder.

The library has C functions, takes raw pointers and a stream, and has CUDA's runtime in it, so one file serves every
version of torch and loads on a machine without a GPU.
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
# sm_90a by -gencode: the shorthand -arch=sm_90a also compiles for plain sm_90. The sources write their fused multiply-adds out.
OPTIONS = (
    "-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-fmad=false", "-shared", "-Xcompiler=-fPIC",
    "-cudart=static", "-Xptxas=-v",
)  # fmt: skip

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where built libraries are kept: INCR_DS_CACHE, else ``incr_ds`` in XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("INCR_DS_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "incr_ds"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else the one on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def library_path() -> Path:
    """The file that these sources are built into; a change of sources or options is another file."""
    return cache_folder() / f"row_kernels_{_fingerprint()}.so"


def build_library() -> Path:
    """The library, compiled unless it is there; what ptxas reports of each kernel stands beside it, ending in .txt.

    Any number of processes may call this at once: one compiles and the others wait. Raises KernelError if there is no
    nvcc, or with what nvcc said if it fails.
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
    """Hold the lock of ``path``, which the system releases when its process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(library: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise KernelError(f"{library.name} must be built and there is no nvcc in CUDA_HOME or on PATH; install CUDA")
    _log.info("building the CUDA row kernels with %s into %s", nvcc, library)
    # Under the name of a finished library there never is an unfinished one.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        command = [nvcc, *OPTIONS, "-o", str(unfinished), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not unfinished.exists():
            raise KernelError(
                f"nvcc ended with status {done.returncode} and did not build the CUDA row kernels; the command was\n"
                f"  {shlex.join(command)}\nand it said\n{(done.stderr + done.stdout)[-4000:]}\n"
                "sm_90a needs CUDA 12 or newer; backend 'triton' needs no nvcc."
            )
        library.with_suffix(".txt").write_text(done.stdout + done.stderr)
        os.replace(unfinished, library)
