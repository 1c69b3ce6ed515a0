"""Every changed byte is found, and the message names the tensor that it belongs to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sources import write_synthetic

from incr_ds.checkpoint.integrity import check_folder
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import read_manifest
from incr_ds.checkpoint.torch_file.checksums import check_records, record_names
from incr_ds.errors import CheckpointError
from incr_ds.testing.pico import pico_architecture


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory):
    """A native checkpoint of two data-parallel ranks with a manifest."""
    folder = tmp_path_factory.mktemp("integrity")
    write_synthetic(folder, pico_architecture(), data_parallel=2)
    return folder / "source"


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << (offset % 8)
    path.write_bytes(content)


def test_the_flipped_byte_of_every_tensor_is_named(published, tmp_path: Path):
    """First, middle and last byte of every extent that the manifest lists, one file at a time."""
    shutil.copytree(published, tmp_path / "copy")
    files = read_manifest(published)["files"]
    found = 0
    for name in (name for name, listed in files.items() if "tensors" in listed):
        path = tmp_path / "copy" / name
        whole = path.read_bytes()
        extents = files[name]["tensors"]
        for extent in extents[:: max(1, len(extents) // 7)]:
            for offset in (0, extent["bytes"] // 2, extent["bytes"] - 1):
                flip(path, extent["offset"] + offset)
                message = rf"content changed in {extent['tensor']} \({extent['state']}, bytes {extent['offset']} to"
                with pytest.raises(CheckpointError, match=message):
                    check_folder(tmp_path / "copy")
                path.write_bytes(whole)
                found += 1
    assert found > 60
    assert check_folder(tmp_path / "copy") is not None


def test_bytes_outside_of_tensors(published, tmp_path: Path):
    """Headers, pickles, padding, every other file, and the manifest itself."""
    shutil.copytree(published, tmp_path / "copy")
    for path in sorted(path for path in (tmp_path / "copy").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for offset in {0, 7 % len(whole), len(whole) // 2, len(whole) - 1}:
            flip(path, offset)
            with pytest.raises(
                CheckpointError,
                match=rf"{path.name}.*(content changed|not valid JSON|cannot be read|not a valid manifest|was changed)",
            ):
                check_folder(tmp_path / "copy")
            path.write_bytes(whole)
    flip(next((tmp_path / "copy").rglob("*_optim_states.pt")), 40)
    with pytest.raises(CheckpointError, match=r"content changed outside of its tensors: headers, padding or metadata"):
        check_folder(tmp_path / "copy")


def test_every_byte_of_the_manifest_counts(published, tmp_path: Path):
    shutil.copytree(published, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    content = path.read_bytes()
    assert json.loads(content)["checksum"]
    for offset in range(0, len(content), 97):
        flip(path, offset)
        with pytest.raises(
            CheckpointError,
            match=r"manifest\.json: (cannot be read|not valid JSON|not a valid manifest|its own checksum)",
        ):
            read_manifest(tmp_path / "copy")
        path.write_bytes(content)


def test_without_a_manifest_the_checksums_of_torch_save_count(published, tmp_path: Path):
    """DeepSpeed's own files have no manifest, and torch.load reads the flipped byte without an error."""
    shutil.copytree(published, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    path = next((tmp_path / "copy" / "grown").glob("zero_pp_rank_1*_optim_states.pt"))
    content = torch.load(path, weights_only=False)
    torch.save(content, path)
    checkpoint = open_source(tmp_path / "copy")
    assert check_folder(tmp_path / "copy", checkpoint) is None
    reader = torch._C.PyTorchFileReader(str(path))
    names = record_names(path)
    assert names["data/1"] == ["optimizer_state_dict.base_optimizer_state.state.0.exp_avg"]
    assert sum(map(len, names.values())) == 8  # step and two moments of two groups, and their masters
    whole = path.read_bytes()
    for record, tensors in names.items():
        flip(path, reader.get_record_offset(record) + 3)
        with pytest.raises(
            CheckpointError,
            match=rf"{path.name}: {tensors[0]} \(record .*{record}\) is damaged "
            r"\(its CRC-32 is [0-9a-f]{8}, but torch.save stored",
        ):
            check_folder(tmp_path / "copy", checkpoint)
        path.write_bytes(whole)


def test_a_changed_file_of_a_training_checkpoint_is_explained_by_its_own_checksums(published, tmp_path: Path):
    """Its manifest lists files only; the damaged tensor is still named."""
    shutil.copytree(published, tmp_path / "copy")
    manifest = read_manifest(tmp_path / "copy")
    name = next(name for name in manifest["files"] if name.endswith("mp_rank_00_model_states.pt"))
    extent = manifest["files"][name].pop("tensors")[0]
    from incr_ds.checkpoint.publish import _manifest_text

    (tmp_path / "copy" / "manifest.json").write_text(
        _manifest_text({k: manifest[k] for k in ("kind", "facts", "files")})
    )
    check_folder(tmp_path / "copy")
    flip(tmp_path / "copy" / name, extent["offset"] + 5)
    with pytest.raises(CheckpointError, match=r"module\.model\.embed_tokens\.weight \(record .*\) is damaged"):
        check_folder(tmp_path / "copy")


def test_old_and_foreign_files_pass(tmp_path: Path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text").write_text("no archive")
    check_records(tmp_path / "old.pt")
    check_records(tmp_path / "text")
