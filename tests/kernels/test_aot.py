"""Every Triton kernel compiles for sm_90, without spills and within its registers and shared memory; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from incr_ds.kernels import aot

# 64 registers leave 32 warps a multiprocessor; the kernels of CE and forward KL are the ones that are timed.
FAST_REGISTERS, MOST_REGISTERS, MOST_SHARED = 64, 80, 256
FAST = ("statistics_kernel", "KIND=0", "KIND=1", "KIND=4")


def compiled(tmp_path, *arguments):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET")
    command = [sys.executable, "-W", "error", "-m", "incr_ds.kernels.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(usages):
    for usage in usages:
        fast = usage["kernel"] == FAST[0] or usage["constants"].startswith(FAST[1:])
        assert usage["stack"] == 0, usage
        assert usage["registers"] <= (FAST_REGISTERS if fast else MOST_REGISTERS), usage
        assert usage["shared"] <= MOST_SHARED, usage


def test_bf16_kernels_compile_within_their_budgets(tmp_path: Path):
    usages = compiled(tmp_path, "bf16")
    assert len(usages) == 18 and {usage["logits"] for usage in usages} == {"bf16"}
    check(usages)


@pytest.mark.slow
def test_every_kernel_compiles_within_its_budgets(tmp_path: Path):
    usages = compiled(tmp_path)
    assert len(usages) == 54
    check(usages)


def test_an_interpreting_process_says_that_it_cannot_compile():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET to compile"):
        next(aot.compile_row_kernels())
