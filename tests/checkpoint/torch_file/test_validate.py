"""Untrusted .pt files: what torch.load(mmap=True) would read past its bounds, unpack without bound, or fail over."""

import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from incr_ds.checkpoint.torch_file.load import load_pt
from incr_ds.errors import CheckpointError


@pytest.fixture
def saved(tmp_path: Path):
    """Two tensors of 48 bytes, in records of their own."""
    torch.save({"w": torch.arange(12.0).view(3, 4), "secret": torch.full((12,), 7.0)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """The archive again, with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


MISLEADING = {
    "into the next record": (b"K\x0ct", b"K\x60t", r"record data/0 has 48 bytes, a tensor expects 384 there"),
    "past the file": (
        b"K\x0ct",
        b"J\xff\xff\xff\x7ft",
        r"record data/0 has 48 bytes, a tensor expects 8589934588 there",
    ),
    "shape": (
        b"K\x03K\x04\x86",
        b"K\x03K\x05\x86",
        r"a tensor of shape \[3, 5\] reaches beyond the 12 elements of rec",
    ),
    "offset": (b"QK\x00K\x03", b"QK\x05K\x03", r"a tensor of shape \[3, 4\] reaches beyond the 12 elements"),
    "negative offset": (b"QK\x00K\x03", b"QJ\xff\xff\xff\xffK\x03", r"reaches beyond the 12 elements"),
    "strides": (b"K\x04K\x01\x86", b"K\x05K\x01\x86", r"a tensor of shape \[3, 4\] reaches beyond the 12 elements"),
    "repeated": (
        b"K\x0c\x85q\x11K\x01\x85",
        b"J\x00\x00\x00\x40\x85q\x11K\x00\x85",
        r"\[1073741824\] repeats the 12 el",
    ),
    "record": (b"X\x01\x00\x00\x001q", b"X\x01\x00\x00\x009q", r"record data/9 is missing"),
    "path": (b"X\x01\x00\x00\x001q", b"X\x05\x00\x00\x00../..q", r"record data/\.\./\.\. is missing"),
}


@pytest.mark.parametrize("name", MISLEADING)
def test_no_tensor_reaches_beyond_its_record(saved, name):
    old, new, message = MISLEADING[name]
    rewrite(saved, lambda pickled: pickled)
    assert load_pt(saved)["w"][2, 3] == 11
    with zipfile.ZipFile(saved) as archive:
        assert archive.read("a/data.pkl").count(old) >= 1
    rewrite(saved, lambda pickled: pickled.replace(old, new, 1))
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=rf"a\.pt: .*{message}.* was made to mislead; it was refused"):
            load_pt(saved, trust=trust)


def test_compressed_records_are_refused(saved):
    """torch would read the compressed bytes as numbers; a pickle may unpack to a thousand times its size."""
    rewrite(saved, lambda pickled: pickled + b"N0" * 5_000_000, zipfile.ZIP_DEFLATED)
    assert saved.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"record a/data\.pkl is compressed \(\d+ to \d+ bytes\)"):
        load_pt(saved)


BROKEN = {
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "no value": b"\x80\x02.",
    "memo": b"\x80\x02h\x07.",
    "unhashable": b"\x80\x02}}K\x01s.",
    "text": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "numbering": b"\x80\x02Nr\xff\xff\xff\x7f0(" + b".",
    "length": b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "cut": b"\x80\x02}(X\x01\x00\x00\x00w",
    "called": b"\x80\x02K\x05)R.",
    "empty": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles_are_damage(saved, name):
    rewrite(saved, lambda _: BROKEN[name])
    with pytest.raises(CheckpointError, match=r"a\.pt: (damaged or truncated|refers to an object)"):
        load_pt(saved)


@pytest.mark.parametrize("name", ["numbering", "length"])
def test_numbers_in_a_pickle_reserve_nothing(saved, name):
    rewrite(saved, lambda _: BROKEN[name])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            load_pt(saved)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_kinds_of_tensors(tmp_path: Path):
    """What torch itself saves passes: dtypes with and without storage classes, views, scalars, parameters, nothing."""
    whole = torch.arange(24.0).view(4, 6)
    content = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "view": whole[1:3, 2:4],
        "transposed": whole.t(),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "grown": torch.ones(5).expand(1, 5),
        "half": torch.ones(3, dtype=torch.float16),
        "long": torch.arange(3),
        "flags": torch.ones(3, dtype=torch.bool),
        "eight": torch.ones(3, 2).to(torch.float8_e4m3fn),
        "unsigned": torch.ones(7, dtype=torch.uint16),
        "complex": torch.ones(3, dtype=torch.complex64),
        "shape": torch.Size((3, 4)),
    }
    torch.save(content, tmp_path / "a.pt")
    found = load_pt(tmp_path / "a.pt")
    for name, tensor in content.items():
        if isinstance(tensor, torch.Tensor):
            bits = [one.contiguous().view(torch.uint8) if one.dim() else one for one in (found[name], tensor)]
            assert found[name].dtype == tensor.dtype and torch.equal(*bits), name


def test_old_formats_are_named(tmp_path: Path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old\.pt: in the format of torch before 1\.6.*torch\.save it again"):
        load_pt(tmp_path / "old.pt")
    for content, why in (
        (b"", "not an archive"),
        (b"text", "not an archive"),
        (b"PK\x03\x04", "its end, .*, is missing"),
    ):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"damaged or truncated \({len(content)} bytes\): {why}"):
            load_pt(tmp_path / "bad.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "disks.pt")
    content = bytearray((tmp_path / "disks.pt").read_bytes())
    content[content.index(b"PK\x06\x07") + 16] = 2  # the archive's end says that it spans two disks
    (tmp_path / "disks.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged or truncated .*span multiple disks"):
        load_pt(tmp_path / "disks.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a/text", "hello")
    with pytest.raises(CheckpointError, match=r"no record data\.pkl; this is not a file that torch\.save wrote"):
        load_pt(tmp_path / "other.pt")


DOUBLED = b"K\x01\x85q\x010" + b"h\x01h\x01\x86q\x010" * 60 + b"h\x01"  # a tuple of 2^60 leaves
ORDERED = b"ccollections\nOrderedDict\n"
STEPS, DEEP = r"takes more than 16,777,216 steps to build", r"nested more than 64 levels deep"
HOSTILE = {
    "a key that takes years to hash": (STEPS, b"}", DOUBLED, b"K\x01s"),
    "a set of such": (STEPS, b"cbuiltins\nset\n]", DOUBLED, b"a\x85R"),
    "a dictionary made of such": (STEPS, ORDERED, b"]", DOUBLED, b"K\x01\x86a\x85R"),
    "keys above a mark": (STEPS, b"}(", DOUBLED, b"K\x01u"),
    "a dictionary that fills others": (
        STEPS,
        ORDERED,
        b")R}(",
        b"".join(b"X\x04\x00\x00\x00%04dK\x01" % n for n in range(9999)),
        b"uq\x01b",
        ORDERED,
        b")R",
        b"h\x01b" * 9999,
    ),
    "a string encoded a thousand times": (
        STEPS,
        b"X\x00\x00\x10\x00" + b"x" * (1 << 20) + b"q\x01",
        b"c_codecs\nencode\nh\x01X\x05\x00\x00\x00utf-8\x86R0" * 1000,
    ),
    "a list that unfolds without end": (DEEP, b"]q\x010" + b"](h\x01h\x01eq\x010" * 90 + b"h\x01"),
    "a list of 2^40 entries": (
        r"unfolds to more than 16,777,216 entries",
        b"]q\x010" + b"](h\x01h\x01eq\x010" * 40 + b"h\x01",
    ),
    "a list of itself": (DEEP, b"]q\x01h\x01a"),
    "a key nested 100,000 deep": (DEEP, b"}K\x01", b"\x85" * 100_000, b"K\x01s"),
    "a list nested 100,000 deep": (DEEP, b"]" * 100_000, b"a" * 99_999),
    "a hundred thousand entries": (r"more than 32,768 entries", b"]" * 100_000),
    "two thousand names": (r"names more than 1000 globals", *(b"ca%d\nb\n0" % number for number in range(2000)), b"N"),
    "memory by a number": (r"reserves memory by a number", b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"),
    "memory by a length": (r"reserves memory by a number", b"\x96" + (1 << 40).to_bytes(8, "little") + b"abc"),
    "a tensor by its size": (
        r"contains the result of torch\.FloatTensor",
        b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R",
    ),
    "ninety dimensions": (
        r"a tensor has 90 dimensions",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(" + b"K\x01" * 90 + b"th\x00)\x89NtR".replace(b"h\x00", b""),
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_asks_for_more_than_its_size_is_refused_at_once(saved, monkeypatch: pytest.MonkeyPatch, name):
    message, *parts = HOSTILE[name]
    if "hundred thousand entries" in name:
        monkeypatch.setattr("incr_ds.checkpoint.torch_file.walk._MOST_READS", 1 << 16)
    rewrite(saved, lambda _: b"\x80\x02" + b"".join(parts) + b".")
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{message}.*"):
        load_pt(saved)


def test_a_subclass_of_tensor_does_not_hide_its_bounds(tmp_path: Path):
    """Its rebuild calls the plain one itself."""
    torch.save({"w": torch.arange(12.0).as_subclass(Noted), "secret": torch.ones(12)}, tmp_path / "a.pt")
    rewrite(tmp_path / "a.pt", lambda pickle: pickle.replace(b"K\x0ct", b"K\x60t", 1))
    with pytest.raises(CheckpointError, match=r"record data/0 has 48 bytes, a tensor expects 384 there"):
        load_pt(tmp_path / "a.pt")


class Noted(torch.Tensor):
    """A tensor with attributes."""


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_that_are_no_plain_ones_are_named(tmp_path: Path, made):
    torch.save({"w": made()}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"a\.pt: contains the result of torch.*: a tensor that is sparse, quantized or w"
    ):
        load_pt(tmp_path / "a.pt")
