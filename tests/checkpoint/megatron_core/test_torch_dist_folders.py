"""What is read from folders of the format torch_dist, and what is refused: damaged, hostile and unsupported ones."""

import io
import json
import pickle
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from torch_dist_folders import PREFIX, arguments_of, flatten, parameters_of, write_folder, write_source

from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import CheckpointError, IncrError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

STATES = ("weight", "exp_avg", "exp_avg_sq")


def truth(family="llama", **changes):
    return SyntheticCheckpoint(small_architecture(family, num_key_value_heads=2, **changes))


def same(found, expected):
    for spec in expected.architecture.stored:
        for state in STATES:
            whole = expected.read(spec.name, state)
            assert torch.equal(found.read(spec.name, state), whole), (spec.name, state)
            bounds = [(size // 3, size // 2 + 1) for size in whole.shape]
            part = whole[tuple(slice(*pair) for pair in bounds)]
            assert torch.equal(found.read(spec.name, state, tuple(bounds)), part), (spec.name, state)


@pytest.mark.parametrize("tied", [False, True])
def test_masters_moments_step_and_config_are_read(tmp_path: Path, tied: bool):
    source = truth(tie_word_embeddings=tied)
    write_source(tmp_path, source)
    found = open_source(tmp_path)
    assert found.architecture.sizes == source.architecture.sizes
    assert found.architecture.tied == tied
    assert (found.facts.kind, found.facts.step, found.facts.dtype) == (
        "Megatron-core torch_dist",
        source.facts.step,
        "bfloat16",
    )
    assert "padded from 101 to 104 rows, and the padding is left out" in found.facts.notes[0]
    same(found, source)
    assert {name for name in found.self_check()} == {spec.name for spec in source.architecture.stored}


def unstacked(tensors):
    """Every layer under a key of its own, gate and up apart, norms in modules of their own."""
    found = {}
    for key, tensor in tensors.items():
        start, layers, name = key.partition("decoder.layers.")
        if not layers:
            found[key] = tensor
            continue
        name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        for layer, part in enumerate(tensor):
            single = f"{start}{layers}{layer}.{name}"
            halves = dict(zip("wv", part.chunk(2), strict=True)) if name == "mlp.linear_fc1.weight" else {}
            found |= {f"{single}_{end}": half.clone() for end, half in halves.items()} or {single: part.clone()}
    return found


def inside_nemo(tensors):
    return {
        ".".join([*key.split(".")[:3], "module", *key.split(".")[3:]])
        if key.startswith("optimizer.")
        else f"module.{key}": tensor
        for key, tensor in tensors.items()
    }


@pytest.mark.parametrize("change", [unstacked, inside_nemo])
def test_other_keys_give_the_same_tensors(tmp_path: Path, change):
    source = truth()
    write_source(tmp_path, source, change)
    same(open_source(tmp_path), source)


def test_a_folder_of_one_iteration_and_a_tag_are_opened(tmp_path: Path):
    source = truth()
    inner = write_source(tmp_path, source)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert open_source(inner).facts.path == inner == open_source(tmp_path, inner.name).facts.path
    with pytest.raises(CheckpointError, match="release: missing; latest_checkpointed_iteration.txt names it"):
        open_source(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match="expected a number of an iteration, or release, found '../../etc'"):
        open_source(tmp_path)


def test_other_formats_are_refused_by_name(tmp_path: Path):
    inner = write_source(tmp_path, truth())
    (inner / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    with pytest.raises(CheckpointError, match="sharded_backend 'zarr': only torch_dist can be read"):
        open_source(tmp_path)
    (inner / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata without metadata\.json, and no key starts with 'model\.'"):
        open_source(tmp_path)
    (inner / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no metadata.json; the checkpoint was not saved completely"):
        open_source(tmp_path)


UNSUPPORTED = {
    "num_experts": (8, "args.moe_router_topk: expected a number, found None"),
    "mtp_num_layers": (1, "args.mtp_num_layers: found 1, and a config follows from None only"),
    "normalization": ("L2Norm", "args.normalization: found 'L2Norm', and a config follows from 'RMSNorm' only"),
    "layernorm_zero_centered_gamma": (True, "args.layernorm_zero_centered_gamma: found True"),
    "rotary_base": (None, "args.rotary_base: expected a number, found None"),
    "num_layers": (4, r"expected shape \[4, 96\], found \[3, 96\]"),
    "ffn_hidden_size": (112, "parameter\\(s\\) do not match the config"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_arguments_of_other_models_are_refused(tmp_path: Path, name: str):
    value, message = UNSUPPORTED[name]
    write_source(tmp_path, truth(), **{name: value})
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_a_config_answers_what_the_arguments_leave_open(tmp_path: Path):
    source = truth()
    write_folder(tmp_path, parameters_of(source, "weight"), {"iteration": 7})
    with pytest.raises(CheckpointError, match="holds no arguments of Megatron-LM.*--config FILE"):
        open_source(tmp_path)
    (tmp_path / "given.json").write_text(json.dumps(dict(source.architecture.config)))
    found = open_source(tmp_path, config=tmp_path / "given.json")
    assert torch.equal(found.read("model.norm.weight"), source.read("model.norm.weight"))
    assert found.facts.states == ("weight",)
    assert found.facts.no_moments == "it was saved without the optimizer"


def test_the_eps_has_another_name_from_0_16_on(tmp_path: Path):
    inner = write_source(tmp_path, truth(rms_norm_eps=3e-6))
    common = torch.load(inner / "common.pt", weights_only=False)
    vars(common["args"])["layernorm_epsilon"] = vars(common["args"]).pop("norm_epsilon")
    torch.save(common, inner / "common.pt")
    assert open_source(tmp_path).architecture.config["rms_norm_eps"] == 3e-6


def test_what_the_ranks_share_may_be_an_object_among_the_shards(tmp_path: Path):
    """As Megatron-core 0.19 stores it; common.pt, if there is one, comes first there, too."""
    source = truth()
    inner = write_source(tmp_path, source)
    content = (inner / "common.pt").read_bytes()
    metadata = pickle.loads((inner / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save([torch.load(inner / "common.pt", weights_only=False)], buffer)
    (inner / "__1_0.distcp").write_bytes(buffer.getvalue())
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    place = _StorageInfo("__1_0.distcp", 0, len(buffer.getvalue()))
    metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = place
    (inner / ".metadata").write_bytes(pickle.dumps(metadata))
    (inner / "common.pt").unlink()
    found = open_source(tmp_path)
    assert found.architecture.sizes == source.architecture.sizes
    assert (found.facts.step, found.facts.recorded.global_steps) == (source.facts.step, 7)
    same(found, source)
    (inner / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="__1_0.distcp: damaged or truncated"):
        open_source(tmp_path)
    (inner / "common.pt").write_bytes(content)
    assert open_source(tmp_path).facts.step == source.facts.step


def test_llama_3_scaling_follows_from_the_arguments(tmp_path: Path):
    write_source(tmp_path, truth(), use_rope_scaling=True, rope_scaling_factor=8.0)
    rope = open_source(tmp_path).architecture.config["rope_parameters"]
    expected = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert {key: rope[key] for key in expected} == expected


def test_moments_in_the_layout_of_buffers_are_refused_by_name(tmp_path: Path):
    source = truth()
    buffers = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(0).bucket_idx_0.exp_avg": torch.ones(8)}
    common = {"args": arguments_of(source.architecture), "iteration": 7}
    write_folder(tmp_path, parameters_of(source, "weight") | buffers, common)
    found = open_source(tmp_path)
    assert found.facts.states == ("weight",)
    with pytest.raises(CheckpointError, match="dp_reshardable.*save with --dist-ckpt-optim-fully-reshardable"):
        found.read("model.norm.weight", "exp_avg")


def optimizer_keys(source):
    return [PREFIX[state] + key for state in STATES for key in parameters_of(source, state)]


@pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (2, 2)], ids=str)
def test_flattened_masters_and_moments_are_read(tmp_path: Path, ranks):
    """fully_sharded_model_space: the parts of tensor ranks, flattened and divided over data-parallel ranks."""
    source = truth()
    flatten(write_source(tmp_path, source), optimizer_keys(source), *ranks)
    found = open_source(tmp_path)
    assert found.facts.states == STATES and found.facts.step == source.facts.step
    same(found, source)
    assert set(found.self_check()) == {spec.name for spec in source.architecture.stored}


def test_flattened_moments_whose_shape_is_not_stated_are_refused(tmp_path: Path):
    source = truth()
    inner = write_source(tmp_path, source)
    flatten(inner, optimizer_keys(source), 1, 2)
    changed(inner, lambda metadata: setattr(metadata, "mcore_data", {}))
    found = open_source(tmp_path)
    assert found.facts.states == ("weight",)
    assert torch.equal(found.read("model.norm.weight"), source.read("model.norm.weight").bfloat16())
    with pytest.raises(CheckpointError, match="no exp_avg: .*without their shapes.*use optimizer: reset"):
        found.read("model.norm.weight", "exp_avg")


@pytest.mark.parametrize("shape", [(3, 96, 251), (96, 250), (3, 0, 250)], ids=str)
def test_flattened_moments_of_another_shape_are_refused(tmp_path: Path, shape):
    source = truth()
    inner = write_source(tmp_path, source)
    flatten(inner, [FC2], 2, 2)
    changed(inner, lambda metadata: metadata.mcore_data[FC2].update(nd_reformulated_orig_global_shape=shape))
    with pytest.raises(CheckpointError, match=r"linear_fc2.weight: \[3, 1, 2, 12000\] are not equal parts of"):
        open_source(tmp_path)


def test_unknown_parameters_and_steps_that_differ_are_refused(tmp_path: Path):
    (tmp_path / "extra").mkdir()
    write_source(tmp_path / "extra", truth(), lambda t: {**t, "decoder.layers.mlp.router.weight": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match="decoder.layers.mlp.router.weight: not a parameter of this llama"):
        open_source(tmp_path / "extra")
    inner = write_source(tmp_path, truth())
    common = torch.load(inner / "common.pt", weights_only=False)
    common["optimizer"]["optimizer"]["param_groups"].append({"step": 99})
    torch.save(common, inner / "common.pt")
    with pytest.raises(CheckpointError, match=r"states several steps of Adam: \[99, 100\]"):
        open_source(tmp_path)


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return subprocess.check_call, (["touch", str(self.target)],)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_no_code_in_a_file_runs(tmp_path: Path, name: str):
    inner = write_source(tmp_path, truth())
    content = {"args": Attack(tmp_path / "ran")}
    if name == "common.pt":
        torch.save(content, inner / name)
    else:
        (inner / name).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"holds no arguments|refers to subprocess.check_call"):
        open_source(tmp_path)
    assert not (tmp_path / "ran").exists()


def changed(inner: Path, change):
    """The metadata again, with its objects changed."""
    metadata = pickle.loads((inner / ".metadata").read_bytes())
    change(metadata)
    (inner / ".metadata").write_bytes(pickle.dumps(metadata))


def chain(metadata, number):
    """As if several optimizers had stored the states: those of norms the second, all others the first."""
    for key in [key for key in metadata.state_dict_metadata if key.startswith("optimizer.")]:
        name = f"chained_{number(key)}.{key}"
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop(key)
        for index in [index for index in metadata.storage_data if index.fqn == key]:
            info = metadata.storage_data.pop(index)
            metadata.storage_data[MetadataIndex(name, index.offset)] = info


def test_states_of_chained_optimizers_are_read(tmp_path: Path):
    """As Megatron-core before 0.14 stored those of a mixture's experts, and of the rest."""
    source = truth()
    changed(write_source(tmp_path, source), lambda metadata: chain(metadata, lambda key: int("norm" in key)))
    same(open_source(tmp_path), source)


def test_a_state_that_two_optimizers_have_is_refused(tmp_path: Path):
    inner = write_source(tmp_path, truth())

    def twice(metadata):
        chain(metadata, lambda key: 0)
        for key in [key for key in metadata.state_dict_metadata if key.startswith("chained_0.")]:
            copy = key.replace("chained_0", "chained_1")
            metadata.state_dict_metadata[copy] = metadata.state_dict_metadata[key]
            for index in [index for index in metadata.storage_data if index.fqn == key]:
                metadata.storage_data[MetadataIndex(copy, index.offset)] = metadata.storage_data[index]

    changed(inner, twice)
    with pytest.raises(CheckpointError, match="several chained optimizers have a state of the same key"):
        open_source(tmp_path)


def place(metadata, key):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def chunks(metadata, key):
    return metadata.state_dict_metadata[key].chunks


def overlap(metadata):
    """Two halves of a tensor, which share a column."""
    size, starts = torch.Size([3, 96, 125]), [torch.Size([0, 0, start]) for start in (0, 124)]
    metadata.state_dict_metadata[FC2].chunks = [ChunkStorageMetadata(start, size) for start in starts]
    info = place(metadata, FC2)
    metadata.storage_data |= {MetadataIndex(FC2, start): info for start in starts}


def interlock(metadata):
    """Thousands of chunks without a grid, which would have to be compared each with each."""
    info = place(metadata, FC2)
    found = []
    for row, column in product(range(96), range(0, 250, 10)):
        first = 1 + (row + column // 10) % 2  # every other one cuts the three layers as 1 + 2, the next as 2 + 1
        for start, layers in ((0, first), (first, 3 - first)):
            found.append(ChunkStorageMetadata(torch.Size([start, row, column]), torch.Size([layers, 1, 10])))
    metadata.state_dict_metadata[FC2].chunks = found
    metadata.storage_data |= {MetadataIndex(FC2, chunk.offsets): info for chunk in found}


NORM, FC2 = "decoder.final_layernorm.weight", "optimizer.state.fp32_param.decoder.layers.mlp.linear_fc2.weight"
ELSEWHERE = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
DAMAGE = {
    "path": (
        lambda m: setattr(place(m, FC2), "relative_path", "../../secret"),
        "is not the name of a .distcp file; refused",
    ),
    "beyond": (lambda m: setattr(place(m, FC2), "offset", 1 << 40), "damaged or truncated"),
    "negative": (lambda m: setattr(place(m, FC2), "offset", -5), "damaged or truncated.*expected sizes, found"),
    "short": (lambda m: setattr(place(m, FC2), "length", 100), "damaged or truncated"),
    "shifted": (lambda m: setattr(place(m, FC2), "offset", place(m, FC2).offset + 7), "damaged or truncated"),
    "another": (
        lambda m: vars(place(m, FC2)).update(vars(place(m, ELSEWHERE))),
        r"expected shape \[3, 96, 250\], found \[96\]",
    ),
    "outside": (lambda m: setattr(chunks(m, FC2)[0], "sizes", torch.Size([4, 96, 250])), "lies outside"),
    "gap": (
        lambda m: setattr(chunks(m, FC2)[0], "sizes", torch.Size([2, 96, 250])),
        "hold 48000 elements, expected the 72000",
    ),
    "overlap": (overlap, "its chunks hold 72000 elements, expected the 72000 of shape .* once each"),
    "interlocked": (interlock, "its chunks hold 72000 elements, expected the 72000 of shape .* once each"),
    "huge": (lambda m: setattr(m.state_dict_metadata[FC2], "size", torch.Size([1 << 61, 1, 1])), "lies outside"),
    "dtype": (
        lambda m: setattr(m.state_dict_metadata[FC2].properties, "dtype", torch.bfloat16),
        "expected bfloat16, found a FloatStorage",
    ),
    "integers": (lambda m: setattr(m.state_dict_metadata[FC2].properties, "dtype", torch.int8), "dtype int8"),
    "codec": (lambda m: setattr(place(m, FC2), "transform_descriptors", ["zstd"]), "only plain shards can be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_metadata_that_misleads_is_refused(tmp_path: Path, name: str):
    change, message = DAMAGE[name]
    changed(write_source(tmp_path, truth()), change)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path).read("model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_cut_or_missing_file_is_refused(tmp_path: Path, name: str):
    inner = write_source(tmp_path, truth())
    content = (inner / name).read_bytes()
    for left in (content[: len(content) // 2], b"", None):
        (inner / name).unlink()
        if left is not None:
            (inner / name).write_bytes(left)
        with pytest.raises(IncrError, match=r"damaged or truncated|missing|incomplete"):
            list(open_source(tmp_path).self_check())
        (inner / name).write_bytes(content)


def test_a_flipped_bit_is_found(tmp_path: Path):
    inner = write_source(tmp_path, truth())
    [file] = inner.glob("*.distcp")
    content = bytearray(file.read_bytes())
    at = content.find(truth().read("model.layers.1.mlp.down_proj.weight", "exp_avg").numpy().tobytes()[:64])
    content[at + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="record archive/data/0 is damaged"):
        list(open_source(tmp_path).self_check())


def test_a_megatron_checkpoint_grows(tmp_path: Path):
    """The same bytes as from the same model in another format."""
    source = truth()
    (tmp_path / "source").mkdir()
    write_source(tmp_path / "source", source)
    (tmp_path / "recipe.yaml").write_text("target: {num_hidden_layers: 5}\nlayout: {format: universal}\n")
    grow_checkpoint(plan_request(GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "out")))
    grown = open_source(tmp_path / "out")
    assert grown.facts.step == source.facts.step
    for state in STATES:
        kept = source.read("model.layers.2.mlp.up_proj.weight", state)
        assert any(
            torch.equal(grown.read(f"model.layers.{layer}.mlp.up_proj.weight", state), kept) for layer in range(5)
        )
