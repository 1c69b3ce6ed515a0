"""Sources whose numbers cannot be grown: dtypes that are none of a trained model's, and NaN and infinity."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import incr_ds
from incr_ds.errors import CheckpointError
from incr_ds.source.finite import is_finite
from incr_ds.testing.memory import drawn_model, small_architecture

NAME = "model.layers.1.mlp.up_proj.weight"
RECIPE = "target: {intermediate_size: 331}\noptimizer: reset\nlayout: {format: huggingface}\n"


@pytest.fixture
def source(tmp_path):
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


def test_nan_and_infinity_are_counted_and_named(source):
    request = source(with_nonfinite)
    planned = incr_ds.plan_request(request)
    with pytest.raises(
        CheckpointError, match=rf"{NAME} \(weight\): 3 of 24,000 numbers are not finite.*--allow-nonfinite"
    ):
        incr_ds.grow_checkpoint(planned)
    assert [path.name for path in request.output.parent.iterdir() if "grown" in path.name] == []


def test_nan_and_infinity_are_grown_for_who_asks_and_noted(source):
    request = incr_ds.GrowthRequest(**vars(source(with_nonfinite)) | {"allow_nonfinite": True})
    facts = incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    note = f"numbers of the source that are not finite (NaN or infinity): 3 in {NAME} (weight)"
    assert facts["notes"][-1] == note
    assert note in json.loads((request.output / "manifest.json").read_text())["facts"]["notes"]
    assert not is_finite(load_file(request.output / "model.safetensors")[NAME])


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
