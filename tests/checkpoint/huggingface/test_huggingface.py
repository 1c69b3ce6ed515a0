"""The Hugging Face reader against folders that transformers writes, and its messages for incomplete folders."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from incr_ds.checkpoint.huggingface.reader import INDEX
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import CheckpointError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.testing.memory import drawn_model, small_architecture


@pytest.fixture
def written(tmp_path: Path):
    """write(tied, shard) -> (folder, {parameter: weight})."""

    def write(tied=False, shard="100KB"):
        model = drawn_model(small_architecture("llama", tie_word_embeddings=tied), torch.float32)
        model.save_pretrained(tmp_path / "model", max_shard_size=shard)
        return tmp_path / "model", dict(model.named_parameters())

    return write


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def change_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(("shard", "several"), [("100KB", True), ("1GB", False)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_read(written, tied: bool, shard, several):
    folder, parameters = written(tied, shard)
    assert (len(shards(folder)) > 2) == several
    checkpoint = open_source(folder)
    assert checkpoint.facts.kind == "Hugging Face safetensors"
    assert checkpoint.facts.states == ("weight",) and checkpoint.facts.step is None
    assert set(parameters) == {spec.name for spec in checkpoint.architecture.stored}
    for name, weight in parameters.items():
        assert torch.equal(checkpoint.read(name), weight), name
        middle = slice(len(weight) // 3, len(weight) // 2 + 1)
        assert torch.equal(checkpoint.read(name, bounds=((middle.start, middle.stop),)), weight[middle]), name
    assert set(checkpoint.self_check()) == {spec.name for spec in checkpoint.architecture.tensors}


def test_tied_alias_reads_its_owner(written):
    folder, parameters = written(tied=True)
    assert torch.equal(open_source(folder).read("lm_head.weight"), parameters["model.embed_tokens.weight"])


def test_moments_are_refused(written):
    with pytest.raises(CheckpointError, match=r"a Hugging Face folder has no exp_avg; use optimizer: reset"):
        open_source(written()[0]).read("lm_head.weight", "exp_avg")


def test_missing_shard(written):
    folder, _ = written()
    path = shards(folder)[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}: missing; the folder is incomplete"):
        open_source(folder)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_truncated_shard(written, keep):
    folder, _ = written()
    path = shards(folder)[-1]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"{path.name}: damaged or truncated \(\d+ bytes\).*Copy the file again"):
        open_source(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0.bin", "x" * 300 + ".bin", "config.json", 5, None, ["a"]])
def test_index_with_other_names(written, name):
    folder, _ = written()
    change_index(folder, lambda files: files.update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .* is not a plain file name; refused"):
        open_source(folder)


def test_index_that_points_outside(written):
    folder, _ = written()
    change_index(folder, lambda files: files.update({"lm_head.weight": "../elsewhere.safetensors"}))
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: '\.\./elsewhere\.safetensors' is not a plain file name"
    ):
        open_source(folder)


def test_index_naming_a_tensor_that_its_shard_lacks(written):
    folder, _ = written()
    change_index(folder, lambda files: files.update({"lm_head.weight": files["model.embed_tokens.weight"]}))
    with pytest.raises(
        CheckpointError, match=rf"content differs from {INDEX}: lm_head\.weight is only in one of the two"
    ):
        open_source(folder)


def test_index_that_is_none(written):
    folder, _ = written()
    (folder / INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match=rf"{INDEX}: expected a JSON object, found list"):
        open_source(folder)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path, {"format": "pt"})


def test_tied_copy_that_differs(written):
    folder, parameters = written(tied=True, shard="1GB")
    copy = parameters["model.embed_tokens.weight"].detach().clone()
    rewrite(folder, lambda content: content.update({"lm_head.weight": copy}))
    assert "lm_head.weight" in list(open_source(folder).self_check())
    copy[100, 95] += 1
    rewrite(folder, lambda content: content.update({"lm_head.weight": copy}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        list(open_source(folder).self_check())


def test_buffers_of_old_checkpoints_are_left_out(written):
    """They follow from the config; transformers no longer saves them."""
    folder, parameters = written(shard="1GB")
    rewrite(folder, lambda content: content.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    checkpoint = open_source(folder)
    assert len(list(checkpoint.self_check())) == len(parameters)


def test_wrong_shape_and_unknown_tensor(written):
    folder, _ = written(shard="1GB")

    def change(content):
        content["model.norm.weight"] = torch.ones(97)
        content["model.extra.weight"] = torch.ones(3)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"2 tensor\(s\) do not match the config") as caught:
        open_source(folder)
    assert "model.norm.weight: expected shape [96], found [97]" in str(caught.value)
    assert "model.extra.weight: not a tensor of this llama" in str(caught.value)


def write_bin(folder, parameters, shards):
    """The layout of transformers before safetensors."""
    for path in folder.glob("model*"):
        path.unlink()
    if shards == 1:
        torch.save(parameters, folder / "pytorch_model.bin")
        return
    names = list(parameters)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = names[number::shards]
        torch.save({name: parameters[name].data for name in part}, folder / file)
        weight_map |= {name: file for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_weights_are_read(written, shards):
    folder, parameters = written(shard="1GB")
    write_bin(folder, {name: parameter.data for name, parameter in parameters.items()}, shards)
    checkpoint = open_source(folder)
    assert checkpoint.facts.kind == "Hugging Face .bin"
    assert len(checkpoint.facts.files) == shards
    for name, weight in parameters.items():
        assert torch.equal(checkpoint.read(name), weight), name
        assert torch.equal(checkpoint.read(name, bounds=((3, 50),)), weight[3:50]), name
    assert len(list(checkpoint.self_check())) == len(parameters)


def test_bin_payloads_do_not_run(written):
    folder, parameters = written(shard="1GB")
    write_bin(folder, {**parameters, "extra": slice(1)}, 1)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refers to .*slice.*was refused.*--trust"):
        open_source(folder)


@pytest.mark.parametrize(
    "odd", [argparse.Namespace(seed=1), 5, [torch.ones(3)], None], ids=lambda odd: type(odd).__name__
)
def test_a_bin_file_that_holds_something_else_than_a_tensor(tmp_path: Path, odd):
    architecture = small_architecture("llama")
    drawn_model(architecture, torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights | {"model.norm.weight": odd}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin: model\.norm\.weight: .*not what transformers writes there"
    ):
        open_source(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_says_how_to_fetch_the_file(written, name):
    folder, _ = written(shard="1GB")
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: a git-lfs pointer in place of the file.*`git lfs pull`"):
        open_source(folder)


def test_a_pointer_in_place_of_the_tokenizer_is_refused_before_anything_is_written(written, tmp_path: Path):
    folder, _ = written(shard="1GB")
    (folder / "tokenizer.json").write_text(POINTER)
    (tmp_path / "recipe.yaml").write_text("target: {}\noptimizer: reset\nlayout: {format: huggingface}\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: a git-lfs pointer"):
        plan_request(GrowthRequest(folder, tmp_path / "recipe.yaml", tmp_path / "grown"))
