"""A grown model trains as its source through the engine: multipliers become parameter groups, saved and resumed."""

from pathlib import Path

import pytest
import yaml
from trajectory_engines import AFTER, architecture, follow, resume, train_source

from incr_ds.arch.multipliers import Multipliers, read_multipliers
from incr_ds.checkpoint.opening import open_source
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.processes import run_processes

EVEN = {"ffn": {"new": "copy"}, "heads": {"new": "copy"}, "symmetry_breaking": {"method": "none"}}
LAYOUTS = {
    "zero2": {"data_parallel": 2, "zero_stage": 2},
    "pipeline": {"pipeline_parallel": 2},
    "tensor": {"tensor_parallel": 2},
}


def doubled(tied):
    axes, sizes = architecture(tied).family.axes, architecture(tied).sizes
    return {axes[axis]: 2 * sizes[axis] for axis in ("hidden", "ffn", "heads", "kv_heads")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A trained source's folder and the losses of its next steps, with tied embeddings or without; made on first use."""
    known = {}

    def made(tied):
        if tied not in known:
            folder = tmp_path_factory.mktemp("trajectory")
            known[tied] = folder, run_processes(train_source, 2, str(folder), tied)[0]
        return known[tied]

    return made


def beginning(folder, tied, name, on_load):
    """model.initialize_from for a grown checkpoint, or for a growth on load."""
    recipe = {"target": doubled(tied), "width": EVEN, "layout": LAYOUTS[name]}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    if on_load:
        return {"source": str(folder / "source"), "recipe": str(path)}
    output = folder / f"grown-{name}"
    if not output.exists():
        grow_checkpoint(plan_request(GrowthRequest(folder / "source", path, output)))
    return str(output)


def largest_difference(first, second):
    return max(abs(a - b) / a for a, b in zip(first, second, strict=False))


@pytest.mark.parametrize(
    ("tied", "name", "on_load"),
    [
        pytest.param(True, "zero2", False, marks=pytest.mark.slow),
        (True, "pipeline", False),
        pytest.param(False, "pipeline", True, marks=pytest.mark.slow),
    ],
)
def test_forty_steps_through_the_engine_are_the_sources(sources, tmp_path, tied, name, on_load):
    folder, losses = sources(tied)
    assert losses[-1] < losses[0] - 0.1
    model = {"initialize_from": beginning(folder, tied, name, on_load)}
    ((first, rates, saved), *_) = run_processes(follow, 2, str(tmp_path), model, LAYOUTS[name])
    assert rates == [0.5, 1.0]
    rest = run_processes(resume, 2, str(tmp_path), saved, model, LAYOUTS[name])[0]
    assert len(first + rest) == AFTER
    assert largest_difference(losses, first + rest) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pipeline", "zero2"])
def test_forty_steps_of_muon_through_the_engine_are_the_sources(tmp_path, name):
    """On the grown checkpoint, and grown on load: the momentum is where DeepSpeed's Muon looks for it."""
    muon = {"name": "muon", "muon": {"learning_rate_ratio": 3.0}}
    losses = run_processes(train_source, 2, str(tmp_path), True, muon)[0]
    assert losses[-1] < losses[0] - 0.1
    model = {"initialize_from": beginning(tmp_path, True, name, on_load=name == "zero2")}
    ranks = run_processes(follow, 2, str(tmp_path), model, LAYOUTS[name], muon)
    first, _, saved = ranks[0]
    # A matrix that is doubled in both dimensions keeps Muon's rate.
    assert {round(rate, 9) for _, rates, _ in ranks for rate in rates} == {0.5, 1.0, 3.0}
    rest = run_processes(resume, 2, str(tmp_path), saved, model, LAYOUTS[name], muon)[0]
    assert largest_difference(losses, first + rest) <= 1e-5


@pytest.mark.slow
def test_tensor_ranks_follow_too(sources, tmp_path):
    folder, losses = sources(True)
    model = {"initialize_from": beginning(folder, True, "tensor", on_load=False)}
    ((first, *_), *_) = run_processes(follow, 2, str(tmp_path), model, LAYOUTS["tensor"])
    assert largest_difference(losses, first) <= 1e-5


def test_without_multipliers_it_trains_otherwise(sources, tmp_path):
    """multipliers: none reads the same checkpoint, whose flat buffers are those of other groups."""
    folder, losses = sources(True)
    model = {"initialize_from": beginning(folder, True, "zero2", on_load=False)}
    alike = {"multipliers": "none"}
    ((found, rates, saved), *_) = run_processes(follow, 2, str(tmp_path), model, LAYOUTS["zero2"], alike)
    assert rates == [1.0] and not read_multipliers(Path(saved))
    assert abs(found[0] - losses[0]) <= 1e-5 * losses[0], "masters and moments are in place"
    assert largest_difference(losses, found) > 1e-3


def test_a_second_growth_multiplies_the_multipliers(sources, tmp_path):
    folder, _ = sources(True)
    first = Path(beginning(folder, True, "zero2", on_load=False))
    sizes = {"hidden_size": 256, "intermediate_size": 1000, "num_attention_heads": 16, "num_key_value_heads": 8}
    recipe = {"target": sizes, "width": EVEN, "layout": LAYOUTS["zero2"]}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe))
    grow_checkpoint(plan_request(GrowthRequest(first, tmp_path / "again.yaml", tmp_path / "twice")))
    once, twice = read_multipliers(first), read_multipliers(tmp_path / "twice")
    reader, writer = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    assert once[reader] == Multipliers(0.5, 0.5, 2.0) and twice[reader] == Multipliers(0.25, 0.25, 4.0)
    assert once[writer] == Multipliers(1.0, 0.5, 1.0) and twice[writer] == Multipliers(1.0, 0.25, 1.0)
    # The files have two groups, as engines of other trainers do, with the run file's settings.
    groups = open_source(tmp_path / "twice").facts.optimizer_groups
    assert [(group["lr"], group["weight_decay"], "multipliers" in group) for group in groups] == [
        (pytest.approx(3e-3), pytest.approx(0.1), False),
        (pytest.approx(3e-3), 0.0, False),
    ]
    grown_as_it_is = {"target": {}, "optimizer": "reset", "layout": LAYOUTS["zero2"]}
    (tmp_path / "reset.yaml").write_text(yaml.safe_dump(grown_as_it_is))
    grow_checkpoint(plan_request(GrowthRequest(first, tmp_path / "reset.yaml", tmp_path / "reset")))
    assert not read_multipliers(tmp_path / "reset")
