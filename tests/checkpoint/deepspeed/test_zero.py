"""The ZeRO reader against real DeepSpeed engines: stages, data-parallel degrees, dtypes, orders of flat buffers."""

import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from zero_engines import write_cases

from incr_ds.checkpoint.base import rounds_to
from incr_ds.checkpoint.finite import FiniteCheckpoint
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError, GrowthError
from incr_ds.growth.rules import MOMENT_RULES, refuse
from incr_ds.offline.compare import logical_parts
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.sharding.joined import joined_parameters
from incr_ds.testing.processes import run_processes


class Written(NamedTuple):
    """A checkpoint that DeepSpeed's engines wrote, and the weights that they had then."""

    folder: Path
    live: dict[str, torch.Tensor]


# A matrix that has a twin of its shape, and a norm.
FROZEN = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight")
EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj",)  # every expert's matrices in one parameter
CASES = {
    "z0": {"stage": 0, "bf16": False, "tied": True, "zero": {}, "buffer": True},
    "z0-bf16-frozen": {"stage": 0, "bf16": True, "tied": False, "zero": {}, "frozen": FROZEN},
    "z1": {"stage": 1, "bf16": False, "tied": False, "zero": {}},
    "z1-bf16-frozen": {"stage": 1, "bf16": True, "tied": True, "zero": {}, "frozen": FROZEN, "buffer": True},
    "z2-frozen": {"stage": 2, "bf16": False, "tied": True, "zero": {}, "frozen": FROZEN},
    "z3-bf16-frozen": {"stage": 3, "bf16": True, "tied": False, "zero": {}, "frozen": FROZEN},
    "z1-bf16-tied": {"stage": 1, "bf16": True, "tied": True, "zero": {}},
    "z2-bf16-round-robin": {"stage": 2, "bf16": True, "tied": False, "zero": {"round_robin_gradients": True}},
    "z1-round-robin": {"stage": 1, "bf16": False, "tied": True, "zero": {"round_robin_gradients": True}},
    "z2-aligned": {"stage": 2, "bf16": True, "tied": True, "zero": {"parameter_alignment": True}},
    "bf16-optimizer": {"stage": 1, "bf16": True, "tied": True, "zero": {}, "bf16_optimizer": True},
    "z0-mixtral": {"stage": 0, "bf16": False, "tied": False, "zero": {}, "family": "mixtral"},
    "z1-qwen3-moe-frozen": {
        "stage": 1,
        "bf16": True,
        "tied": False,
        "zero": {},
        "family": "qwen3_moe",
        "frozen": EXPERTS,
    },
    "z3-mixtral": {"stage": 3, "bf16": True, "tied": True, "zero": {}, "family": "mixtral"},
    "z3": {"stage": 3, "bf16": False, "tied": False, "zero": {}},
    "z3-bf16-tied-small-groups": {"stage": 3, "bf16": True, "tied": True, "zero": {"sub_group_size": 20_000}},
}
RELEASE = tuple(map(int, version("deepspeed").split("+")[0].split(".")[:2]))
KINDS = {"bf16-optimizer": "BF16_Optimizer"}
if RELEASE < (0, 18):  # its ZeRO-3 hangs in the training of a mixture on two ranks
    del CASES["z3-mixtral"]
if RELEASE < (0, 19):  # no such setting yet
    del CASES["z2-aligned"]
if RELEASE == (0, 18):  # gives both kinds of bf16 optimizer one name, and saves no state of what it builds for them
    del CASES["bf16-optimizer"], CASES["z0-bf16-frozen"]
if RELEASE < (0, 18):  # has one kind only
    KINDS["z0-bf16-frozen"] = "BF16_Optimizer"


# Each number of ranks starts DeepSpeed once more. Three ranks have uneven partitions, so they are the default.
RANKS = [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Every case as this many data-parallel ranks write it."""

    @cache
    def write(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"dp{ranks}")
        run_processes(write_cases, ranks, str(folder), CASES)
        return folder

    def find(case: str, ranks: int = 3) -> Written:
        folder = write(ranks) / case
        return Written(folder, torch.load(folder / "live.pt"))

    return find


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_read(written, case, ranks):
    folder, live = written(case, ranks)
    checkpoint = open_source(folder)
    stage = CASES[case]["stage"]
    kind = KINDS.get(case, f"ZeRO-{stage}")
    assert checkpoint.facts.kind == f"DeepSpeed {kind}"
    # DeepSpeed's bf16 optimizer without ZeRO takes a step of its own to make the states.
    assert checkpoint.facts.step == (3 if case == "z0-bf16-frozen" and kind == "ZeRO-0" else 2)
    assert checkpoint.facts.layout == {
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "data_parallel": ranks,
        "zero_stage": 1 if kind == "BF16_Optimizer" else stage,
    }
    assert {group["weight_decay"] for group in checkpoint.facts.optimizer_groups} == {0.1, 0.0}
    parameters, live = len(live), logical_parts(checkpoint.architecture, live)
    joined, frozen = joined_parameters(checkpoint.architecture), set(CASES[case].get("frozen", ()))
    frozen = {
        *(frozen - joined.keys()),
        *(spec.name for name in frozen & joined.keys() for spec in joined[name].members),
    }
    assert set(live) == {spec.name for spec in checkpoint.architecture.stored}
    for name, weight in live.items():
        master = checkpoint.read(name)
        assert master.dtype == (weight.dtype if name in frozen else torch.float32)
        assert torch.equal(master.to(weight.dtype), weight), name
        if name in frozen:
            assert not checkpoint.read(name, "exp_avg").any() and not checkpoint.read(name, "exp_avg_sq").any()
            continue
        assert torch.equal(checkpoint.read(name, "exp_avg"), 2 * master), name
        assert torch.equal(checkpoint.read(name, "exp_avg_sq"), master**2), name
        middle = slice(len(weight) // 3, len(weight) // 2 + 1)
        assert torch.equal(checkpoint.read(name, "exp_avg", ((middle.start, middle.stop),)), 2 * master[middle]), name
    assert len(list(checkpoint.self_check())) == parameters
    assert checkpoint.facts.frozen == tuple(sorted(frozen))


def test_a_tied_alias_reads_its_owner(written):
    checkpoint = open_source(written("z1-bf16-tied").folder)
    assert torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight"))


@pytest.fixture
def damaged(written, tmp_path: Path):
    def copy(case, ranks=3):
        shutil.copytree(written(case, ranks).folder, tmp_path / "copy")
        return tmp_path / "copy"

    return copy


def optimizer_file(folder, rank, prefix=""):
    return folder / "step" / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_missing_shard(damaged):
    folder = damaged("z1")
    optimizer_file(folder, 1).unlink()
    with pytest.raises(
        CheckpointError, match=r"missing zero_pp_rank_1_mp_rank_00_optim_states\.pt of a grid of 1 .* x 3"
    ):
        open_source(folder)


def test_missing_last_shard(damaged):
    """File names do not show it. The model file records the number of ranks."""
    folder = damaged("z1")
    optimizer_file(folder, 2).unlink()
    with pytest.raises(CheckpointError, match=r"written with 3 data-parallel ranks, found 2 optimizer file"):
        open_source(folder)


def test_missing_model_file(damaged):
    folder = damaged("z2-bf16-round-robin")
    (folder / "step" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"missing mp_rank_00_model_states\.pt"):
        open_source(folder)


@pytest.mark.parametrize(
    "name", ["layer_0_expert_1_mp_rank_00_model_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_experts_of_deepspeeds_own_layers_are_refused(damaged, name: str):
    folder = damaged("z1")
    shutil.copy(folder / "step" / "mp_rank_00_model_states.pt", folder / "step" / name)
    with pytest.raises(CheckpointError, match=rf"step/{name}: a file of DeepSpeed's own mixture-of-experts layers"):
        open_source(folder)


def test_truncated_shard(damaged):
    folder = damaged("z1")
    path = optimizer_file(folder, 0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_0_mp_rank_00_optim_states\.pt: damaged or truncated"):
        open_source(folder)


def swap(first, second):
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def copy_content(source, target):
    """Write the content of rank ``source`` as rank ``target`` would: names inside the file do not show it."""
    torch.save(torch.load(source, weights_only=False), target)


@pytest.mark.parametrize("case", ["z1", "z3"])
def test_swapped_files(damaged, case):
    folder = damaged(case)
    swap(optimizer_file(folder, 0), optimizer_file(folder, 2))
    with pytest.raises(CheckpointError, match=r"rank_0_.*was written as zero_pp_rank_2_mp_rank_00_optim_states\.pt"):
        open_source(folder)


@pytest.mark.parametrize("case", ["z1", "z2-bf16-round-robin"])
def test_swapped_content(damaged, case):
    folder = damaged(case)
    prefix = "bf16_" if CASES[case]["bf16"] else ""
    first, second = optimizer_file(folder, 0, prefix), optimizer_file(folder, 1, prefix)
    contents = [torch.load(path, weights_only=False) for path in (first, second)]
    torch.save(contents[1], first)
    torch.save(contents[0], second)
    with pytest.raises(CheckpointError, match=r"elements of the fp32 master .* differ .*[Ss]hards were swapped"):
        list(open_source(folder).self_check())


@pytest.mark.parametrize("case", ["z1", "z3"])
def test_duplicated_shard(damaged, case):
    folder = damaged(case)
    copy_content(optimizer_file(folder, 0), optimizer_file(folder, 1))
    with pytest.raises(
        CheckpointError, match=r"rank_1_mp_rank_00_optim_states\.pt: holds the same weights as zero_pp_rank_0"
    ):
        list(open_source(folder).self_check())


def test_shard_of_another_run(damaged):
    folder = damaged("z1")
    rewrite(optimizer_file(folder, 1), lambda content: content["optimizer_state_dict"].update(partition_count=[2, 2]))
    with pytest.raises(CheckpointError, match=r"one of 2 partitions, expected one of 3"):
        open_source(folder)


def test_config_of_another_model(damaged):
    folder = damaged("z1")
    text = (folder / "config.json").read_text().replace('"intermediate_size": 250', '"intermediate_size": 256')
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: expected shape \[256, 96\], found \[250, 96\]"):
        open_source(folder)


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path(self.canary),)


def test_a_payload_does_not_run(damaged, tmp_path: Path):
    folder = damaged("z1")
    path = folder / "step" / "mp_rank_00_model_states.pt"
    canary = tmp_path / "canary"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "extra": Payload(str(canary))}, path)
    with pytest.raises(CheckpointError, match=r"refers to .*pathlib.*was refused.*--trust"):
        open_source(folder)
    assert not canary.exists()
    open_source(folder, trust=True)
    assert canary.exists()


def test_fp16_with_a_dynamic_loss_scaler(damaged):
    """What DeepSpeed writes in fp16, made from an fp32 checkpoint."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    folder = damaged("z1")
    model_file = folder / "step" / "mp_rank_00_model_states.pt"
    content = torch.load(model_file, weights_only=False)
    content["module"] = {name: weight.half() for name, weight in content["module"].items()}
    torch.save(content, model_file)
    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, torch.float16)
    for rank in range(3):
        content = torch.load(optimizer_file(folder, rank), weights_only=False)
        content["optimizer_state_dict"] |= {"loss_scaler": scaler, "dynamic_loss_scale": True}
        torch.save(content, optimizer_file(folder, rank))
    live = torch.load(folder / "live.pt")
    checkpoint = open_source(folder)
    assert checkpoint.facts.dtype == "float16"
    assert all(torch.equal(checkpoint.read(name), weight) for name, weight in live.items())
    assert len(list(checkpoint.self_check())) == len(live)


def test_weights_exported_by_a_trainer_must_be_the_masters(damaged):
    """transformers' Trainer saves safetensors beside DeepSpeed's folder, the only weights to check a ZeRO-3 checkpoint by."""
    folder = damaged("z3")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "latest").write_text("step")
    weights = torch.load(folder / "live.pt")
    save_file(weights, folder / "model.safetensors")
    checkpoint = open_source(folder)
    assert checkpoint.facts.kind == "DeepSpeed ZeRO-3"
    assert len(list(checkpoint.self_check())) == len(weights)
    weights["model.layers.1.mlp.up_proj.weight"][249, 95] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: the weights exported there are not the fp32 masters"
    ):
        list(open_source(folder).self_check())


def test_tag_folder_and_unknown_tag(written):
    folder = written("z1").folder
    with pytest.raises(CheckpointError, match=r"this is a tag folder; give its parent and --tag step"):
        open_source(folder / "step")
    with pytest.raises(CheckpointError, match=r"no folder for tag 'other'; existing folders: step"):
        open_source(folder, "other")


def model_file(folder):
    return folder / "step" / "mp_rank_00_model_states.pt"


def rewrite(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_a_tied_copy_that_differs(damaged):
    folder = damaged("z1-bf16-tied")

    def change(content):
        content["module"]["lm_head.weight"] = content["module"]["lm_head.weight"].clone()
        content["module"]["lm_head.weight"][3, 5] += 1

    rewrite(model_file(folder), change)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        list(open_source(folder).self_check())


def renamed(rename):
    """A change of a model file: every parameter's name in every place."""

    def change(content):
        for key in ("module", "frozen_param_shapes", "frozen_param_fragments", "shared_params"):
            if content.get(key):
                content[key] = {rename(name): value for name, value in content[key].items()}
        if content.get("shared_params"):
            content["shared_params"] = {name: rename(owner) for name, owner in content["shared_params"].items()}
        content["buffer_names"] = [rename(name) for name in content.get("buffer_names") or ()]
        if content.get("param_shapes"):
            groups = content["param_shapes"]
            content["param_shapes"] = [{rename(name): shape for name, shape in group.items()} for group in groups]

    return change


@pytest.mark.parametrize("case", ["z0", "z1-bf16-tied", "z2-frozen", "z3"])
@pytest.mark.parametrize("rename", [lambda n: f"_orig_mod.{n}", lambda n: n.removeprefix("model.")])
def test_compiled_models_and_models_without_their_prefix(written, damaged, case, rename):
    folder = damaged(case)
    for path in (folder / "step").glob("*model_states.pt"):
        rewrite(path, renamed(rename))
    checkpoint = open_source(folder)
    for name, weight in written(case).live.items():
        assert torch.equal(checkpoint.read(name).to(weight.dtype), weight), name
        if name not in CASES[case].get("frozen", ()):
            assert torch.equal(checkpoint.read(name, "exp_avg"), 2 * checkpoint.read(name))
    assert len(list(checkpoint.self_check())) == len(written(case).live)


def test_a_tied_copy_that_differs_under_another_name(damaged):
    folder = damaged("z1-bf16-tied")

    def change(content):
        renamed(lambda name: f"_orig_mod.{name}")(content)
        content["module"]["_orig_mod.lm_head.weight"] = content["module"]["_orig_mod.lm_head.weight"] + 1

    rewrite(model_file(folder), change)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        list(open_source(folder).self_check())


@pytest.mark.parametrize("case", ["z1-bf16-tied", "z2-frozen", "z3", "z0"])
def test_a_model_that_diverged_is_no_damaged_checkpoint(damaged, case):
    """NaN in the master and in the module's weight: the two still belong together; growth refuses the NaN itself."""
    folder = damaged(case, ranks=1)
    names = [spec.name for spec in open_source(folder).architecture.stored]
    for path in (folder / "step").glob("*.pt"):
        rewrite(path, lambda content: list(map(_fill_with_nan, content.values())))
    checkpoint = open_source(folder)
    assert all(checkpoint.read(name).isnan().all() for name in names)
    assert len(list(checkpoint.self_check())) == len(names)
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(exp_avg\): 96 of 96 numbers are not finite"):
        FiniteCheckpoint(checkpoint, otherwise="").read("model.norm.weight", "exp_avg")


def _fill_with_nan(content):
    if isinstance(content, torch.Tensor):
        if content.is_floating_point() and content.numel() > 1:  # Adam counts its steps in a tensor
            content.data.fill_(torch.nan)
    elif isinstance(content, dict | list | tuple):
        for inner in content.values() if isinstance(content, dict) else content:
            _fill_with_nan(inner)


@pytest.mark.parametrize(
    ("case", "file", "key", "message"),
    [
        ("z1", "*optim_states.pt", "single_partition_of_fp32_groups", "weight of optimizer group 0: dtype complex64"),
        ("z3", "*optim_states.pt", "fp32_flat_groups", "weight of optimizer group 0: dtype complex64"),
        ("z2-frozen", "*model_states.pt", "frozen_param_fragments", r"model.layers.0.*: dtype complex64"),
        ("z0", "*model_states.pt", "module", r"model.embed_tokens.weight: dtype complex64"),
    ],
)
def test_a_dtype_that_cannot_be_grown_is_refused(damaged, case, file, key, message: str):
    folder = damaged(case)

    def change(content):
        holder = content.get("optimizer_state_dict", content)
        tensors = holder[key]
        if isinstance(tensors, dict):
            holder[key] = {name: tensor.to(torch.complex64) for name, tensor in tensors.items()}
        else:
            holder[key] = [tensor.to(torch.complex64) for tensor in tensors]

    for path in (folder / "step").glob(file):
        rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_adapters_that_were_trained(damaged):
    folder = damaged("z2-frozen")
    for path in (folder / "step").glob("*model_states.pt"):
        rewrite(path, renamed(lambda name: name.replace("up_proj", "up_proj.base_layer")))
    with pytest.raises(CheckpointError, match=r"up_proj.base_layer.weight: this is an adapter \(LoRA\)"):
        open_source(folder)


@pytest.mark.parametrize("case", ["z1-bf16-frozen", "z2-frozen", "z3-bf16-frozen"])
def test_frozen_parameters_that_were_left_out(damaged, case):
    """As save_checkpoint(exclude_frozen_parameters=True) leaves them."""
    folder = damaged(case)

    def leave_out(content):
        content["frozen_param_shapes"] = content["frozen_param_fragments"] = None
        content["module"] = {name: value for name, value in (content["module"] or {}).items() if name not in FROZEN}

    for path in (folder / "step").glob("*model_states.pt"):
        rewrite(path, leave_out)
    message = r"2 tensor\(s\) do not match the config; .*saved with exclude_frozen_parameters=True: save it again"
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_zero_0_whose_order_is_ambiguous(damaged):
    """Groups split tensors of one shape. In fp32 nothing shows which moments belong to which tensor."""
    folder = damaged("z0")

    def regroup(content):
        first, second = content["optimizer"]["param_groups"]
        gates = [
            number for number in first["params"] if content["optimizer"]["state"][number]["exp_avg"].shape == (250, 96)
        ]
        first["params"] = [number for number in first["params"] if number != gates[1]]
        content["optimizer"]["param_groups"].append({**second, "params": [gates[1]]})

    rewrite(model_file(folder), regroup)
    only_weights(folder, r"29 parameters in 3 group\(s\) without names, and more than one of the")


def only_weights(folder, message, live=None):
    """Read the weights of a checkpoint. A growth that needs its moments gets the reason why they cannot be used."""
    checkpoint = open_source(folder)
    assert checkpoint.facts.states == ("weight",) and checkpoint.facts.step is None
    for name, weight in (live or {}).items():
        assert torch.equal(checkpoint.read(name).to(weight.dtype), weight), name
    assert list(checkpoint.self_check())
    with pytest.raises(GrowthError, match=message + r".*but optimizer: rescale needs them; set optimizer: reset"):
        refuse(MOMENT_RULES, "x", checkpoint.facts, GrowthRecipe(target={}))
    refuse(MOMENT_RULES, "x", checkpoint.facts, GrowthRecipe(target={}, optimizer="reset"))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read("model.norm.weight", "exp_avg")


def test_zero_0_in_an_order_of_its_own(damaged):
    folder = damaged("z0")
    rewrite(model_file(folder), lambda content: content["optimizer"]["param_groups"][0]["params"].reverse())
    only_weights(folder, r"without names, and none of the module's orders matches \(save with ZeRO-1\)")


# What other optimizers, or none, leave of each parameter's state.
STATES = {
    "before the first step": (
        lambda state: state.clear(),
        r"has no exp_avg, exp_avg_sq.* \(found nothing: saved before the",
    ),
    "SGD": (
        lambda state: [state.clear(), state.update(momentum_buffer=torch.ones(3))],
        r"has no exp_avg, exp_avg_sq, step \(found momentum_buffer\); only Adam's moments can be grown",
    ),
    "NAdam": (
        lambda state: state.update(mu_product=torch.tensor(0.8)),
        r"has mu_product \(NAdam\) beside Adam's moments",
    ),
    "AMSGrad": (
        lambda state: state.update(max_exp_avg_sq=torch.ones(3)),
        r"has max_exp_avg_sq \(AMSGrad\) beside Adam's moments, which growth would lose",
    ),
}


@pytest.mark.parametrize("case", ["z0", "z1-bf16-tied", "z2-frozen", "z3", "bf16-optimizer"])
@pytest.mark.parametrize("optimizer", STATES)
def test_states_that_are_not_adams_alone(written, damaged, case, optimizer):
    if case not in CASES:
        pytest.skip("this release does not write it")
    change, message = STATES[optimizer]
    folder = damaged(case)

    def change_all(content):
        adam = content["optimizer"] if case == "z0" else content["optimizer_state_dict"]
        adam = adam.get("base_optimizer_state", adam.get("optimizer_state_dict", adam))
        for state in adam["state"].values():
            change(state)

    for path in (folder / "step").glob("*model_states.pt" if case == "z0" else "*optim_states.pt"):
        rewrite(path, change_all)
    only_weights(folder, message, written(case).live)


def test_a_reset_growth_of_an_sgd_source(written, damaged, tmp_path: Path):
    """The target has no moments, and AdamW's default settings, since SGD's would not load."""
    folder = damaged("z1")

    def to_sgd(content):
        adam = content["optimizer_state_dict"]["base_optimizer_state"]
        for state in adam["state"].values():
            state.clear()
        adam["param_groups"] = [
            {"lr": 0.1, "momentum": 0.9, "params": group["params"]} for group in adam["param_groups"]
        ]

    for path in (folder / "step").glob("*optim_states.pt"):
        rewrite(path, to_sgd)
    (tmp_path / "recipe.yaml").write_text("target: {intermediate_size: 331}\noptimizer: reset\n")
    grow_checkpoint(plan_request(GrowthRequest(folder, tmp_path / "recipe.yaml", tmp_path / "grown")))
    grown, name = open_source(tmp_path / "grown"), "model.layers.1.mlp.up_proj.weight"
    assert grown.facts.states == ("weight",)
    assert torch.equal(grown.read(name)[:250], written("z1").live[name])
    for path in (tmp_path / "grown" / "grown").glob("*optim_states.pt"):
        adam = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
        assert adam["state"] == {} and all("betas" in group for group in adam["param_groups"])


@pytest.mark.parametrize("leave", ["further state", "no moments"])
def test_a_universal_checkpoint_of_another_optimizer(damaged, tmp_path: Path, leave):
    (tmp_path / "recipe.yaml").write_text("target: {}\nlayout: {format: universal}\n")
    grow_checkpoint(plan_request(GrowthRequest(damaged("z1"), tmp_path / "recipe.yaml", tmp_path / "universal")))
    (tmp_path / "universal" / "manifest.json").unlink()
    for folder in (tmp_path / "universal" / "grown" / "zero").glob("*/"):
        if leave == "further state":
            shutil.copy(folder / "exp_avg_sq.pt", folder / "max_exp_avg_sq.pt")
        else:
            (folder / "exp_avg.pt").unlink(), (folder / "exp_avg_sq.pt").unlink()
    message = (
        "max_exp_avg_sq.pt and Adam's moments" if leave == "further state" else "hold no exp_avg.pt and exp_avg_sq.pt"
    )
    only_weights(tmp_path / "universal", message)


def test_a_missing_latest_offers_the_tags(damaged):
    folder = damaged("z1")
    shutil.copytree(folder / "step", folder / "global_step10")
    (folder / "notes").mkdir()
    (folder / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"without a file `latest`; name one .* --tag: global_step10, step\.$"):
        open_source(folder)
    assert open_source(folder, tag="global_step10").facts.step == 2
    with pytest.raises(CheckpointError, match="this is a tag folder; give its parent and --tag step"):
        open_source(folder / "step")


def test_a_git_lfs_pointer_says_how_to_fetch_the_file(damaged):
    folder = damaged("z1")
    optimizer_file(folder, 1).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"rank_1_mp.*: a git-lfs pointer in place of the file.*`git lfs pull`"):
        open_source(folder)


def test_a_module_without_its_optimizer(written, damaged):
    folder = damaged("z0")
    rewrite(model_file(folder), lambda content: content.update(optimizer=None))
    only_weights(folder, "a module without its optimizer", written("z0").live)


def test_a_frozen_parameter_that_was_not_saved(damaged):
    folder = damaged("z2-frozen")
    rewrite(model_file(folder), lambda content: content["frozen_param_fragments"].popitem())
    with pytest.raises(CheckpointError, match=r"a frozen parameter of shape \[.*\] that was not saved"):
        open_source(folder)
    folder = folder.rename(folder.with_name("first"))
    other = damaged("z3-bf16-frozen")
    path = other / "step" / "zero_pp_rank_2_mp_rank_00_model_states.pt"
    rewrite(path, lambda content: content["frozen_param_fragments"].clear())
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_2.*: no share of the frozen parameter"):
        open_source(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_masters_are_compared_as_numbers(dtype):
    """Minus zero equals zero, and NaN equals NaN. A model that diverged is not reported as swapped shards."""
    masters = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    masters[0, :2] = torch.tensor([0.0, float("inf")])
    saved = masters.to(dtype, copy=True)
    assert rounds_to(masters, saved) and rounds_to(masters.T, saved.T)
    assert not rounds_to(masters, saved.roll(1))
    saved[0, 0] = -0.0
    assert rounds_to(masters, saved)
    masters[1, 1] = float("nan")
    assert not rounds_to(masters, saved)
    saved[1, 1] = float("nan")
    assert rounds_to(masters, saved)
    saved[1, 2] = float("nan")
    assert not rounds_to(masters, saved)
