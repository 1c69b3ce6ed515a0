"""Which row kernels run (logged once), and refusals with their reasons."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from incr_ds.kernels import dispatch, triton_rows
from incr_ds.kernels.dispatch import row_kernels
from incr_ds.losses.distillation import distillation_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def forget_choices():
    dispatch._automatic.cache_clear()
    yield
    dispatch._automatic.cache_clear()


def test_automatic_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        names = [row_kernels("auto", CPU, torch.float32).name for _ in range(3)]
    assert names == ["torch"] * 3
    assert [record.message for record in caplog.records] == [
        "distillation loss on cpu: row kernels torch (the device is not CUDA)"
    ]


def test_automatic_choice_on_a_cuda_device_is_triton_where_it_can_be_imported(caplog, monkeypatch: pytest.MonkeyPatch):
    with caplog.at_level(logging.INFO):
        assert row_kernels("auto", CUDA, torch.bfloat16).name == "triton"
    assert row_kernels("auto", CUDA, torch.float64).name == "torch"
    dispatch._automatic.cache_clear()
    without_triton(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert row_kernels("auto", CUDA, torch.bfloat16).name == "torch"
    assert "distillation loss on cuda: row kernels torch (Triton cannot be imported" in caplog.text


def without_triton(monkeypatch):
    monkeypatch.delattr("incr_ds.kernels.triton_rows")
    monkeypatch.setitem(sys.modules, "incr_ds.kernels.triton_rows", None)


def test_a_request_that_cannot_be_met_says_why(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ValueError, match="'triton' cannot run: its kernels compute in fp32, but the tensors are float64"
    ):
        row_kernels("triton", CPU, torch.float64)
    with pytest.raises(ValueError, match="'triton' cannot run: Triton's interpreter rounds bfloat16 wrongly"):
        row_kernels("triton", CPU, torch.bfloat16)
    monkeypatch.setattr(triton_rows, "INTERPRETED", False)
    with pytest.raises(ValueError, match="tensors are on 'cpu', not on a CUDA device .* Use backend='torch' or 'auto'"):
        row_kernels("triton", CPU, torch.float32)
    without_triton(monkeypatch)
    with pytest.raises(ValueError, match="'triton' cannot run: Triton cannot be imported"):
        row_kernels("triton", CPU, torch.float32)


def test_cuda_rows_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ValueError, match="'cuda' cannot run: its kernels compute in fp32, but the tensors are float64"):
        row_kernels("cuda", CUDA, torch.float64)
    with pytest.raises(ValueError, match="'cuda' cannot run: the tensors are on 'cpu', not on a CUDA device. Use"):
        row_kernels("cuda", CPU, torch.float32)
    nvcc = tmp_path / "nvcc"
    monkeypatch.setenv("INCR_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"'cuda' cannot run: its library .*cache.* is not built, and there is no nvcc"
    ):
        row_kernels("cuda", CUDA, torch.bfloat16)
    nvcc.write_text("")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' cannot run: torch finds no CUDA device"):
        row_kernels("cuda", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"built for compute capability \(9, 0\), this device's is \(8, 0\)"):
        row_kernels("cuda", CUDA, torch.bfloat16)


def test_unknown_backends_are_named():
    with pytest.raises(
        ValueError, match="backend 'tirton' is unknown; the backends are auto, reference, torch, triton, cuda"
    ):
        row_kernels("tirton", CPU, torch.float32)


def test_the_reference_refuses_a_buffer_for_the_head():
    hidden, head, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="'reference' leaves gradients to autograd"):
        distillation_loss(hidden, head, labels, alpha=0.0, backend="reference", head_gradient=torch.zeros_like(head))


def test_the_loss_runs_where_triton_is_not_installed():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, incr_ds\n"
        "hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)\n"
        "incr_ds.distillation_loss(hidden, head, torch.tensor([1, 2, 3]), alpha=0.0).loss.backward()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
