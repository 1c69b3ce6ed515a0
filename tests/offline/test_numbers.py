"""Sources whose numbers cannot be grown: unsupported dtypes, NaN and infinity."""

import errno
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import incr_ds
from incr_ds.checkpoint import workspace
from incr_ds.checkpoint.finite import is_finite
from incr_ds.errors import CheckpointError
from incr_ds.testing.memory import drawn_model, small_architecture

NAME = "model.layers.1.mlp.up_proj.weight"
RECIPE = "target: {intermediate_size: 331}\noptimizer: reset\nlayout: {format: huggingface}\n"


@pytest.fixture
def source(tmp_path: Path):
    """source(change, pickled): a request to grow a folder whose tensor NAME went through ``change``."""

    def write(change, pickled=False):
        folder = tmp_path / "source"
        drawn_model(small_architecture("llama"), torch.float32).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[NAME] = change(tensors[NAME])
        if pickled:
            (folder / "model.safetensors").unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors")
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        return incr_ds.GrowthRequest(folder, tmp_path / "recipe.yaml", tmp_path / "grown")

    return write


# torch's name, safetensors' name
DTYPES = [
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.float8_e5m2, "F8_E5M2"),
    (torch.int8, "I8"),
    (torch.int64, "I64"),
    (torch.bool, "BOOL"),
    (torch.complex64, "C64"),
]


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(("dtype", "name"), DTYPES, ids=[name for _, name in DTYPES])
def test_a_dtype_that_cannot_be_grown_is_refused_before_planning(source, dtype, name, pickled):
    request = source(lambda weight: weight.to(dtype), pickled)
    shown = str(dtype).removeprefix("torch.") if pickled else name
    with pytest.raises(CheckpointError, match=rf"{NAME}: dtype {shown}; .* use its unquantized release"):
        incr_ds.plan_request(request)
    assert [path.name for path in request.output.parent.iterdir() if "grown" in path.name] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_point_dtypes_are_read(source, dtype):
    assert incr_ds.open_source(source(lambda weight: weight.to(dtype)).source).read(NAME).dtype == dtype


def with_nonfinite(weight):
    weight[7, 3], weight[249, 95], weight[0, 0] = torch.nan, torch.inf, -torch.inf
    return weight


def test_nan_and_infinity_are_counted_and_named_and_leave_no_folder(source, tmp_path: Path):
    request = incr_ds.GrowthRequest(**vars(source(with_nonfinite)) | {"output": tmp_path / "new" / "deep" / "grown"})
    planned = incr_ds.plan_request(request)
    with pytest.raises(
        CheckpointError, match=rf"{NAME} \(weight\): 3 of 24,000 numbers are not finite.*--allow-nonfinite"
    ):
        incr_ds.grow_checkpoint(planned)
    assert not (tmp_path / "new").exists()


def test_nan_and_infinity_are_grown_for_who_asks_and_noted(source):
    request = incr_ds.GrowthRequest(**vars(source(with_nonfinite)) | {"allow_nonfinite": True})
    facts = incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    assert facts["notes"][-1] == NOTE
    assert NOTE in json.loads((request.output / "manifest.json").read_text())["facts"]["notes"]
    assert not is_finite(load_file(request.output / "model.safetensors")[NAME])


NOTE = f"numbers of the source that are not finite (NaN or infinity): 3 in {NAME} (weight)"


@pytest.fixture
def cut_off(source, monkeypatch: pytest.MonkeyPatch):
    """A request to grow NaN. Its run was interrupted after every file was written and before anything was published."""

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    request = incr_ds.GrowthRequest(**vars(source(with_nonfinite)) | {"allow_nonfinite": True})
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="the same command continues from there"):
        patch.setattr(workspace, "seal", fail)
        incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    return request


def test_a_run_that_goes_on_notes_what_the_run_that_was_cut_off_grew(cut_off):
    phases = []
    planned = incr_ds.plan_request(cut_off)
    facts = incr_ds.grow_checkpoint(planned, lambda phase, done, total: phases.append(phase))
    assert "writing" not in phases, "the files of the run that was cut off are taken over"
    assert facts["notes"][-1] == NOTE


def test_a_run_that_goes_on_refuses_what_only_the_run_that_was_cut_off_was_to_grow(cut_off):
    request = incr_ds.GrowthRequest(**vars(cut_off) | {"allow_nonfinite": False})
    with pytest.raises(CheckpointError, match=rf"{NAME} \(weight\): 3 of 24,000 numbers are not finite"):
        incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    assert [path.name for path in request.output.parent.iterdir() if "grown" in path.name] == []


def export(monkeypatch, capsys, *arguments):
    """Exit code and all output of tools/export_huggingface.py."""
    monkeypatch.setattr(sys, "argv", ["export_huggingface.py", *map(str, arguments)])
    code = 0
    try:
        importlib.import_module("export_huggingface").main()
    except SystemExit as ended:
        code = ended.code or 0
    shown = capsys.readouterr()
    return code, " ".join((shown.out + shown.err).split())


def test_export_refuses_nan_and_infinity_unless_they_are_allowed(
    source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder, output = source(with_nonfinite).source, tmp_path / "new" / "exported"
    code, shown = export(monkeypatch, capsys, folder, output)
    assert code == 2 and not output.parent.exists()
    assert f"{NAME} (weight): 3 of 24,000 numbers are not finite (NaN or infinity)" in shown
    assert "--allow-nonfinite exports this one as it is" in shown
    code, shown = export(monkeypatch, capsys, folder, output, "--allow-nonfinite")
    assert code == 0 and f"note: {NOTE}" in shown
    assert json.loads((output / "manifest.json").read_text())["facts"]["notes"] == [NOTE]
    written = load_file(output / "model.safetensors")[NAME]
    assert written.isnan().sum() == 1 and written[249, 95] == torch.inf and written[0, 0] == -torch.inf


def test_export_refuses_numbers_that_its_dtype_cannot_hold(source, tmp_path: Path):
    def enlarge(weight):
        weight[7, 3], weight[8, 3], weight[9, 3] = 65504.0, 70000.0, -1e30
        return weight

    opened = incr_ds.open_source(source(enlarge).source)
    with pytest.raises(CheckpointError, match=rf"{NAME} \(weight\): at least 2 numbers are larger than 65504.*float16"):
        incr_ds.export_huggingface(opened, tmp_path / "half", torch.float16, tmp_path / "source")
    assert not (tmp_path / "half").exists()
    assert incr_ds.export_huggingface(opened, tmp_path / "brain", torch.bfloat16, tmp_path / "source") == ()
    assert load_file(tmp_path / "brain" / "model.safetensors")[NAME][8, 3] == 70144.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_numbers_are_recognised_by_any_means(dtype):
    large = torch.full((300, 7), torch.finfo(dtype).max, dtype=dtype)
    assert (
        is_finite(large) and is_finite(-large) and is_finite(large[:0]) and is_finite(torch.ones(70_000, dtype=dtype))
    )
    for number in (torch.nan, torch.inf, -torch.inf):
        changed = large.clone()
        changed[299, 6] = number
        assert not is_finite(changed), number
    both = torch.zeros(2, 2, dtype=dtype)
    both[0, 0], both[1, 1] = torch.inf, -torch.inf
    assert not is_finite(both)
