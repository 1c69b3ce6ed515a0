"""The CUDA rows compile for sm_90a within their budgets, once, even if a compiler is interrupted; no GPU needed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from incr_ds.errors import KernelError
from incr_ds.kernels import cuda_library
from incr_ds.kernels.cuda_library import build_library, find_nvcc, library_path
from incr_ds.kernels.cuda_rows import CudaRows, open_library
from incr_ds.kernels.rows import Tempering

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc in CUDA_HOME or on PATH")

# 512 threads in each of two blocks on a multiprocessor, which has 65536 registers.
MOST_REGISTERS = 64
# Three kinds of logits, with temperature 1 and any: statistics with and without teacher, two centres, five gradients.
KERNELS = 3 * 2 * (2 + 2 + 5)
BUILD = "from incr_ds.kernels.cuda_library import build_library; print(build_library())"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCR_DS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield build_library()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the script that runs as nvcc, and an empty cache."""
    monkeypatch.setenv("INCR_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()

    def write(script):
        path = tmp_path / "bin" / "nvcc"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write


@needs_nvcc
def test_every_kernel_compiles_without_spills_and_within_its_registers(built):
    report = built.with_suffix(".txt").read_text()
    entries = re.findall(r"Compiling entry function '(\w+)' for 'sm_90a'", report)
    assert len(entries) == len(set(entries)) == KERNELS
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames == [("0", "0", "0")] * KERNELS
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == KERNELS and max(registers) <= MOST_REGISTERS


@needs_nvcc
def test_the_library_loads_and_launches_or_says_why_not(built):
    library = open_library(built)
    for name in ("statistics", "centre", "gradient"):
        assert hasattr(library, f"incr_ds_{name}")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA row kernel statistics: .*(driver|device)"):
            CudaRows(library).statistics(torch.zeros(3, 8), None, Tempering(torch.tensor(1.0), True))


@needs_nvcc
def test_rows_that_are_not_aligned_are_refused(built):
    with pytest.raises(ValueError, match="rows of logits must start at multiples of 16 bytes"):
        CudaRows(open_library(built)).statistics(torch.zeros(3, 7), None, Tempering(torch.tensor(1.0), True))


@needs_nvcc
def test_a_built_library_is_not_built_again(built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = built.stat().st_mtime_ns
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build_library() == built and built.stat().st_mtime_ns == before


def test_changed_sources_are_another_library(monkeypatch: pytest.MonkeyPatch):
    before = library_path()
    monkeypatch.setattr(cuda_library, "OPTIONS", (*cuda_library.OPTIONS, "-lineinfo"))
    cuda_library._fingerprint.cache_clear()
    assert library_path() != before
    monkeypatch.undo()
    cuda_library._fingerprint.cache_clear()
    assert library_path() == before


def test_a_failing_nvcc_is_quoted_and_leaves_nothing_behind(compiler):
    compiler("echo 'Unsupported gpu architecture' >&2; exit 3")
    with pytest.raises(KernelError, match=r"(?s)nvcc failed with status 3 .*-gencode.*Unsupported gpu architecture"):
        build_library()
    assert [path.suffix for path in library_path().parent.iterdir()] == [".lock"]
    compiler("exit 0")
    with pytest.raises(KernelError, match="status 0 and did not build"):
        build_library()


def test_without_nvcc_the_build_says_so(compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="must be built, but there is no nvcc in CUDA_HOME or on PATH"):
        build_library()


# Writes one word per run and then, slowly, what the last -o names.
SLOW = 'echo run >>"$CUDA_HOME/runs"; while [ "$1" != -o ]; do shift; done; sleep 0.5; echo library >"$2"'


def test_processes_that_ask_at_once_compile_once(compiler, tmp_path: Path):
    compiler(SLOW)
    asking = [
        subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in asking]
    assert answers == [str(library_path())] * 3
    assert (tmp_path / "runs").read_text() == "run\n"
    assert library_path().read_text() == "library\n"


def test_a_killed_build_is_no_obstacle(compiler, tmp_path: Path):
    compiler('echo run >>"$CUDA_HOME/runs"; exec sleep 20')
    killed = subprocess.Popen([sys.executable, "-c", BUILD], env=os.environ, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)  # the compiler that it started runs on
    killed.wait()
    assert not library_path().exists()
    compiler(SLOW)
    begun = time.monotonic()
    assert build_library().read_text() == "library\n"
    assert time.monotonic() - begun < 15
    os.killpg(killed.pid, signal.SIGKILL)
