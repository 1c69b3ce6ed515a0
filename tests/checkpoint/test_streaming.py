"""Files streamed block by block equal those of a writer that holds everything in memory."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from incr_ds.checkpoint.huggingface.writer import huggingface_files
from incr_ds.checkpoint.sink import Sink
from incr_ds.checkpoint.streaming import Part, Slices, StreamedTensor, slice_of, write_file
from incr_ds.checkpoint.torch_file.load import load_pt
from incr_ds.checkpoint.torch_file.write import archive_of
from incr_ds.testing.pico import pico_architecture

SHAPES = {"matrix": (37, 11), "wide": (2, 301), "vector": (53,)}


def coded(name):
    """Element i of a tensor is (tensor's number) * 10000 + i: any misplaced element shows where it came from."""
    shape = SHAPES[name]
    number = list(SHAPES).index(name) + 1
    return (torch.arange(torch.Size(shape).numel()) + 10_000.0 * number).view(shape)


class Reader:
    """Reads coded tensors and remembers how much was asked for at once."""

    def __init__(self):
        self.largest = 0

    def __call__(self, name, state, bounds):
        found = coded(name)[tuple(slice(*part) for part in bounds)]
        self.largest = max(self.largest, found.numel())
        return found if state == "weight" else -found


@st.composite
def parts(draw):
    name = draw(st.sampled_from(sorted(SHAPES)))
    bounds = []
    for size in SHAPES[name]:
        start = draw(st.integers(0, size - 1))
        bounds.append((start, draw(st.integers(start + 1, size))))
    numel = torch.Size([stop - start for start, stop in bounds]).numel()
    first = draw(st.integers(0, numel - 1))
    state, stop = draw(st.sampled_from(["weight", "exp_avg"])), draw(st.integers(first, numel))
    return Part(name, state, tuple(bounds), first, stop, transposed=len(bounds) > 1 and draw(st.booleans()))


@given(st.lists(parts(), max_size=4), st.integers(0, 9), st.integers(1, 400))
def test_blocks_are_the_parts_then_zeros(chosen, padding, block):
    expected = []
    for part in chosen:
        whole = coded(part.name)[tuple(slice(*bound) for bound in part.bounds)]
        whole = (whole.T if part.transposed else whole).reshape(-1)
        expected.append((1 if part.state == "weight" else -1) * whole[part.first : part.stop])
    expected = torch.cat([*expected, torch.zeros(padding)])
    reader = Reader()
    tensor = StreamedTensor((len(expected),), torch.float32, tuple(chosen))
    found = list(Slices(reader, block).blocks(tensor))
    assert torch.equal(torch.cat([*found, torch.empty(0)]), expected)
    assert reader.largest <= max(block, 301)


def streamed(name, dtype=torch.float32):
    shape = SHAPES[name]
    return slice_of(name, "weight", tuple((0, size) for size in shape), dtype)


def content(make):
    """A tree with tied tensors, an empty one, dtypes and constants, as optimizer files have them."""
    tied = make("matrix", torch.float32)
    return {
        "module": {"a": tied, "b": tied, "half": make("wide", torch.bfloat16)},
        "flat": [make("vector", torch.float32), make(None, torch.float32)],
        "step": torch.tensor(3.0),
        "param_shapes": [{"a": torch.Size((37, 11))}],
        "count": 7,
        "none": None,
    }


def whole_tensor(name, dtype):
    return torch.empty(0) if name is None else coded(name).to(dtype)


def streamed_tensor(name, dtype):
    return StreamedTensor((0,), dtype, ()) if name is None else streamed(name, dtype)


def same(first, second):
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    elif isinstance(first, dict | list):
        assert type(first) is type(second) and len(first) == len(second)
        keys = first if isinstance(first, dict) else range(len(first))
        for key in keys:
            same(first[key], second[key])
    else:
        assert first == second and type(first) is type(second)


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_an_archive_reads_as_torch_wrote_it(tmp_path: Path, block):
    path = tmp_path / "mp_rank_00_model_states.pt"
    with Sink(path) as sink:
        archive_of(content(streamed_tensor)).write(sink, path.stem, Slices(Reader(), block))
    buffer = io.BytesIO()
    torch.save(content(whole_tensor), buffer)
    buffer.seek(0)
    expected = torch.load(buffer)
    for found in (torch.load(path), torch.load(path, mmap=True), torch.load(path, weights_only=False), load_pt(path)):
        same(found, expected)
        assert found["module"]["a"].data_ptr() == found["module"]["b"].data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # checksums are right
        assert archive.namelist()[0] == "mp_rank_00_model_states/data.pkl"
    data = path.read_bytes()
    digest = sink.digest
    tensors = digest.pop("tensors")
    assert digest == {"bytes": len(data), "xxh3": xxhash.xxh3_128(data).hexdigest()}
    # Tied tensors share one record; what is empty or constant has no extent.
    assert [(extent["tensor"], extent["state"]) for extent in tensors] == [
        ("matrix", "weight"),
        ("wide", "weight"),
        ("vector", "weight"),
    ]
    for extent in tensors:
        dtype = torch.bfloat16 if extent["tensor"] == "wide" else torch.float32
        own = data[extent["offset"] : extent["offset"] + extent["bytes"]]
        assert own == coded(extent["tensor"]).to(dtype).view(torch.uint8).numpy().tobytes()
        assert extent["xxh3"] == xxhash.xxh3_128(own).hexdigest()


def test_mapped_tensors_are_aligned(tmp_path: Path):
    path = tmp_path / "a.pt"
    with Sink(path) as sink:
        archive_of(content(streamed_tensor)).write(sink, "a", Slices(Reader()))
    reader = torch._C.PyTorchFileReader(str(path))
    records = [name for name in reader.get_all_records() if name.startswith("data/")]
    assert len(records) == 5
    assert all(reader.get_record_offset(name) % 64 == 0 for name in records)


@pytest.mark.slow
def test_a_tensor_past_four_gigabytes(tmp_path: Path):
    """Sizes and offsets beyond 32 bits, in torch and in Python's zip reader."""
    count = (1 << 30) + 5

    def read(name, state, bounds):
        (first, stop), *_ = bounds
        return torch.arange(first, stop).remainder(1 << 20).float()

    part = Part("long", "weight", ((0, count),), 0, count)
    path = tmp_path / "long.pt"
    with Sink(path) as sink:
        tree = {"long": StreamedTensor((count,), torch.float32, (part,)), "after": torch.tensor([1.0, 2.0])}
        archive_of(tree).write(sink, "long", Slices(read, 1 << 22))
    found = torch.load(path, mmap=True)
    assert found["long"][-5:].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found["after"].tolist() == [1.0, 2.0]
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("long/data/0").file_size == 4 * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_shards(tmp_path: Path, dtype):
    architecture = pico_architecture(tied=True)
    generator = torch.Generator().manual_seed(0)
    weights = {spec.name: torch.randn(spec.shape, generator=generator) for spec in architecture.stored}
    files = huggingface_files(architecture, dtype, shard_bytes=20_000)
    assert len(files) > 2

    def read(name, state, bounds):
        return weights[name][tuple(slice(*part) for part in bounds)]

    found = {}
    for file in files:
        write_file(file, tmp_path, Slices(read, 13))
        found |= load_file(tmp_path / file.path)
        size = int.from_bytes((tmp_path / file.path).read_bytes()[:8], "little")
        header = json.loads((tmp_path / file.path).read_bytes()[8 : 8 + size])
        assert header["__metadata__"] == {"format": "pt"} and size % 8 == 0
    assert set(found) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(found[name], weight.to(dtype)), name
