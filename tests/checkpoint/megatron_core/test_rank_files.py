"""What is read from Megatron-LM's format torch, and what is refused: damaged, hostile and unsupported folders."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from megatron_rank_folders import ITERATION, write_ranks

from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import CheckpointError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint


def truth(**changes):
    return SyntheticCheckpoint(small_architecture("llama", num_key_value_heads=2, **changes))


def same(found, expected, states=STATES):
    for spec in expected.architecture.stored:
        for state in states:
            whole = expected.read(spec.name, state)
            assert torch.equal(found.read(spec.name, state), whole), (spec.name, state)
            bounds = [(size // 3, size // 2 + 1) for size in whole.shape]
            part = whole[tuple(slice(*pair) for pair in bounds)]
            assert torch.equal(found.read(spec.name, state, tuple(bounds)), part), (spec.name, state)


@pytest.mark.parametrize("optimizer", ["full", "mixed", "distributed"])
@pytest.mark.parametrize(("degrees", "tied"), [((2, 2), True), ((2, 1), False), ((1, 2), False)], ids=str)
def test_masters_moments_step_and_config_are_read(tmp_path: Path, optimizer, degrees, tied):
    source = truth(tie_word_embeddings=tied)
    inner = write_ranks(tmp_path, source, degrees, optimizer)
    found = open_source(tmp_path)
    assert found.architecture.sizes == source.architecture.sizes and found.architecture.tied == tied
    assert (found.facts.kind, found.facts.step, found.facts.no_moments) == ("Megatron-LM torch", 100, None)
    assert found.facts.dtype == ("float32" if optimizer == "full" else "bfloat16")
    assert found.facts.layout == {"tensor_parallel": degrees[0], "pipeline_parallel": degrees[1]}
    assert found.facts.stages == ((2, 1) if degrees[1] == 2 else ())
    assert found.facts.recorded.global_steps == ITERATION
    assert [group["weight_decay"] for group in found.facts.optimizer_groups] == [0.1, 0.1]
    assert f"padded from 101 to {104 if degrees[0] == 1 else 112} rows" in found.facts.notes[0]
    same(found, source)
    assert set(found.self_check()) == {spec.name for spec in source.architecture.stored}
    assert open_source(inner).facts.path == inner == open_source(tmp_path, inner.name).facts.path


def test_without_an_optimizer_the_weights_are_read(tmp_path: Path):
    source = truth()
    write_ranks(tmp_path, source, (2, 1), None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / f"iter_{ITERATION:07d}").rename(tmp_path / "release")
    found = open_source(tmp_path)
    assert found.facts.states == ("weight",) and found.facts.path.name == "release"
    assert torch.equal(found.read("model.norm.weight"), source.read("model.norm.weight").bfloat16())
    with pytest.raises(CheckpointError, match="no exp_avg: it was saved without the optimizer; use optimizer: reset"):
        found.read("model.norm.weight", "exp_avg")


def test_a_checkpoint_of_ranks_grows(tmp_path: Path):
    source = truth()
    (tmp_path / "source").mkdir()
    write_ranks(tmp_path / "source", source)
    (tmp_path / "recipe.yaml").write_text("target: {num_hidden_layers: 5}\nlayout: {format: torch_dist}\n")
    grow_checkpoint(plan_request(GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "out")))
    grown = open_source(tmp_path / "out")
    assert grown.facts.step == source.facts.step
    for state in STATES:
        kept = source.read("model.layers.2.mlp.up_proj.weight", state)
        layers = [grown.read(f"model.layers.{layer}.mlp.up_proj.weight", state) for layer in range(5)]
        assert any(torch.equal(layer, kept) for layer in layers)


def numbered_anew(content, _):
    """Two matrices of one shape in another order."""
    states = content["optimizer"]["optimizer"]["state"]
    shapes = [tuple(state["exp_avg"].shape) for state in states.values()]
    one, other = next((i, j) for i in range(len(shapes)) for j in range(i) if shapes[i] == shapes[j])
    numbers = content["optimizer"]["optimizer"]["param_groups"]
    assert {one, other} <= set(numbers[0]["params"])
    masters = content["optimizer"]["fp32_from_fp16_params"][0]
    masters[one], masters[other] = masters[other], masters[one]


def test_masters_of_other_parameters_are_found(tmp_path: Path):
    write_ranks(tmp_path, truth(), (1, 1), change=numbered_anew)
    with pytest.raises(
        CheckpointError, match=r"the fp32 master in model_optim_rng.pt does not round to the saved weight"
    ):
        list(open_source(tmp_path).self_check())


def inner_optimizer(content):
    return content["optimizer"]["optimizer"]


def cut(buffers):
    [buffer] = buffers[0].values()
    for key, tensor in buffer.items():
        buffer[key] = tensor[:-64].clone()


NO_MOMENTS = {
    "several optimizers": ("mixed", lambda content, _: content.update(optimizer=[content["optimizer"]] * 2)),
    "has no exp_avg_sq, which Adam has": (
        "mixed",
        lambda content, _: [state.pop("exp_avg_sq") for state in inner_optimizer(content)["state"].values()],
    ),
    "a parameter group has 8 parameters, and 9 are expected": (
        "mixed",
        lambda content, _: inner_optimizer(content)["param_groups"][0]["params"].pop(),
    ),
    "has 4 fp32 masters of 13 parameters": (
        "mixed",
        lambda content, _: content["optimizer"]["fp32_from_fp16_params"].pop(0),
    ),
    "the order of the parameters is another one": (
        "mixed",
        lambda content, _: inner_optimizer(content)["param_groups"][0]["params"].reverse(),
    ),
    "stores buckets one by one": ("distributed", lambda _, buffers: buffers.pop("buckets_coalesced")),
    "has 2 buffers; models of one dtype have one": (
        "distributed",
        lambda _, buffers: buffers.update({1: buffers[0]}),
    ),
    "several buckets hold parameters whose sizes are no multiples of 64": ("distributed", lambda _, b: cut(b)),
}


@pytest.mark.parametrize("message", NO_MOMENTS)
def test_states_whose_order_is_not_certain_are_refused_and_the_weights_read(tmp_path: Path, message: str):
    optimizer, change = NO_MOMENTS[message]
    source = truth()
    write_ranks(tmp_path, source, (1, 2), optimizer, change)
    found = open_source(tmp_path)
    assert found.facts.states == ("weight",) and message in (found.facts.no_moments or "")
    assert torch.equal(found.read("lm_head.weight"), source.read("lm_head.weight").bfloat16())


def test_a_buffer_without_padding_is_read(tmp_path: Path):
    """As Megatron-core wrote it before parameters were aligned."""

    def unpadded(content, buffers):
        [buffer] = buffers[0].values()
        shapes = [tensor.numel() for tensor in content["model"].values() if tensor is not None]
        for key, tensor in buffer.items():
            start, parts = 0, []
            for numel in reversed(shapes):
                start = -(-start // 64) * 64
                parts.append(tensor[start : start + numel])
                start += numel
            buffer[key] = torch.cat(parts)

    source = truth()
    write_ranks(tmp_path, source, (2, 1), "distributed", unpadded)
    same(open_source(tmp_path), source)


def test_a_missing_buffer_is_named(tmp_path: Path):
    inner = write_ranks(tmp_path, truth(), (2, 1), "distributed")
    (inner / "mp_rank_01/distrib_optim.pt").unlink()
    assert open_source(tmp_path).facts.no_moments == "mp_rank_01/distrib_optim.pt is missing"


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return subprocess.check_call, (["touch", str(self.target)],)


def transposed(content, _):
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    content["model"][name] = content["model"][name].T.contiguous().T


REFUSED = {
    "checkpoint_version 1.0: q, k and v lie in another order": lambda c, _: c.update(checkpoint_version=1.0),
    "several model chunks of an interleaved pipeline": lambda c, _: c.update(model0=c.pop("model")),
    "model: not a GPTModel of Megatron-core, but an older one": lambda c, _: c.update(model={"language_model": {}}),
    "linear_fc2.weight: expected a tensor of 16, 32 or 64 bits, found str": lambda c, _: c["model"].update(
        {"decoder.layers.0.mlp.linear_fc2.weight": "x"}
    ),
    "with strides .* does not lie in record .* one row after the other": transposed,
    "mlp.router.weight: not a parameter of this llama": lambda c, _: c["model"].update(
        {"decoder.layers.0.mlp.router.weight": torch.ones(3)}
    ),
    "args.moe_router_topk: expected a number": lambda c, _: vars(c["args"]).update(num_experts=8),
    "optimizer: not what Megatron-LM writes there": lambda c, _: inner_optimizer(c).update(param_groups=[7]),
    "no matrix embedding.word_embeddings.weight": lambda c, _: c["model"].update(
        {"embedding.word_embeddings.weight": torch.ones(())}
    ),
    "states several steps of Adam": lambda c, _: inner_optimizer(c)["param_groups"][0].update(step=99),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, message: str):
    write_ranks(tmp_path, truth(), (1, 1), change=REFUSED[message])
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_no_code_in_a_file_runs(tmp_path: Path):
    source = truth()
    write_ranks(
        tmp_path,
        source,
        (2, 1),
        "distributed",
        lambda c, b: (c.update(more=Attack(tmp_path)), b.update(x=Attack(tmp_path))),
    )
    before = tmp_path.stat().st_mtime_ns
    same(open_source(tmp_path), source)
    assert tmp_path.stat().st_mtime_ns == before


def test_ranks_that_do_not_belong_together_are_refused(tmp_path: Path):
    inner = write_ranks(tmp_path, truth(), (2, 2))
    shutil.copytree(inner, tmp_path / "kept")
    shutil.rmtree(inner / "mp_rank_01_001")
    with pytest.raises(CheckpointError, match="missing mp_rank_01_001 of 2 tensor ranks x 2 pipeline stages"):
        open_source(tmp_path)
    (inner / "mp_rank_01_001").mkdir()
    with pytest.raises(
        CheckpointError, match=r"mp_rank_01_001/model_optim_rng.pt: missing; the checkpoint is incomplete"
    ):
        open_source(tmp_path)
    (inner / "mp_rank_01_001_000").mkdir()
    with pytest.raises(CheckpointError, match="found mp_rank_01_001_000; the ranks of experts cannot be read"):
        open_source(tmp_path)
    shutil.rmtree(inner)
    (tmp_path / "kept").rename(inner)
    path = inner / "mp_rank_01_000/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "iteration": 8}, path)
    with pytest.raises(
        CheckpointError, match=r"have the iterations \['7', '8'\]: they come from different checkpoints"
    ):
        open_source(tmp_path)
    content["model"]["decoder.final_layernorm.weight"] = torch.ones(96)
    torch.save({**content, "model": {k: v for k, v in content["model"].items() if "fc2" not in k}}, path)
    with pytest.raises(CheckpointError, match="its shards hold .* elements"):
        open_source(tmp_path)


def test_copies_on_tensor_ranks_must_be_equal(tmp_path: Path):
    inner = write_ranks(tmp_path, truth(), (2, 1), "full")
    path = inner / "mp_rank_01/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"][3] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"model.norm.weight: weight of decoder.final_layernorm.weight .* differ"):
        list(open_source(tmp_path).self_check())


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_a_cut_file_is_refused(tmp_path: Path, name: str):
    path = write_ranks(tmp_path, truth(), (1, 1), "distributed") / "mp_rank_00" / name
    content = path.read_bytes()
    for left in (content[: len(content) // 2], b"", content[:40]):
        path.write_bytes(left)
        with pytest.raises(CheckpointError, match=r"damaged or truncated"):
            open_source(tmp_path)
