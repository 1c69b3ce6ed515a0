"""The benchmark is fair: all programs make the same tensors from the same source, and the copy moves as many bytes."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import bench_growth
import pytest
import torch
import torch.distributed.checkpoint as dcp

from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.contest import Contestant, race
from incr_ds.testing.synthetic import SyntheticCheckpoint
from incr_ds.testing.torch_resharding import ALIAS, CUTS

STATES = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bench")
    bench_growth.write_source(folder, 2e6)
    return folder


@pytest.mark.parametrize("parameters", [1e8, 5e8, 1.5e9])
def test_the_size_is_about_what_was_asked(parameters):
    assert 0.75 < bench_growth.architecture_of(parameters).num_parameters / parameters < 1.25


def test_everyone_makes_the_same_tensors(home, tmp_path: Path):
    (tmp_path / "reshard.yaml").write_text(bench_growth.RESHARD)
    grow_checkpoint(plan_request(GrowthRequest(home / "source", tmp_path / "reshard.yaml", tmp_path / "ours")))
    bench_growth.load_everything(home / "source" / "grown", tmp_path / "naive")
    truth = SyntheticCheckpoint(bench_growth.architecture_of(2e6))
    for spec in truth.architecture.stored:
        for state, file in STATES.items():
            for folder in (tmp_path / "ours" / "grown", tmp_path / "naive"):
                found = torch.load(folder / "zero" / spec.name / f"{file}.pt")["param"]
                assert torch.equal(found, truth.read(spec.name, state)), (folder.name, spec.name, state)


def test_the_mappings_are_where_the_parameters_are(home):
    truth = SyntheticCheckpoint(bench_growth.architecture_of(2e6))
    found = {}
    for rank in range(bench_growth.DATA_PARALLEL):
        path = home / "source" / "grown" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        for flat, mapping in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True):
            for name, piece in mapping.items():
                found.setdefault(name, []).append(flat[piece.start : piece.start + piece.numel])
    for spec in truth.architecture.stored:
        assert torch.equal(torch.cat(found[spec.name]), truth.read(spec.name).reshape(-1)), spec.name


def test_a_race_measures_each(tmp_path: Path):
    (tmp_path / "input").write_bytes(bytes(3_000_000))
    hungry = "x = bytearray(60_000_000); import time; time.sleep(0.3); "
    write = f"import os; os.makedirs({str(tmp_path / 'out')!r}); open({str(tmp_path / 'out' / 'a')!r}, 'wb').write(bytes(5000))"
    found = race(
        [
            Contestant("hungry", [sys.executable, "-S", "-c", hungry + write], (tmp_path / "input",), tmp_path / "out"),
            Contestant("modest", [sys.executable, "-S", "-c", write], (), tmp_path / "out"),
        ],
        rounds=2,
    )
    hungry, modest = found
    assert (hungry.read, hungry.written, modest.read, modest.written) == (3_000_000, 5000, 0, 5000)
    assert hungry.peak > 60_000_000 > modest.peak > 0
    assert hungry.seconds > 0.3 and hungry.throughput == 3_005_000 / hungry.seconds
    assert not (tmp_path / "out").exists()
    failing = Contestant("failing", [sys.executable, "-c", "raise SystemExit('no such luck')"], (), tmp_path / "out")
    with pytest.raises(RuntimeError, match="failing failed:\nno such luck"):
        race([failing], rounds=1)


def test_the_copy_moves_as_many_bytes(home, tmp_path: Path):
    inputs = sorted((home / "source" / "grown").glob("*.pt"))
    wanted = sum(path.stat().st_size for path in inputs if "optim" in path.name)
    command = [sys.executable, "-S", "-c", bench_growth.COPY, str(wanted), str(tmp_path / "copied"), *map(str, inputs)]
    subprocess.run(command, check=True)
    assert sum(path.stat().st_size for path in (tmp_path / "copied").iterdir()) == wanted


@pytest.mark.parametrize("contestant", [0, -2, pytest.param(-1, marks=pytest.mark.slow)])
def test_everyone_reshards_the_same_tensors_of_a_torch_dist_checkpoint(tmp_path: Path, contestant):
    grow_checkpoint(bench_growth.planned_torch_dist_source(tmp_path, 1e6))
    before, _ = stored(tmp_path / "source/iter_0000100")
    entry = bench_growth.torch_dist_contestants(tmp_path, [1])[contestant]
    subprocess.run(entry.command, check=True, capture_output=True)
    after, chunks = stored(next(iter(entry.output.rglob(".metadata"))).parent)
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    for key, cut in CUTS.items():
        if contestant != -2:  # one process cuts nothing
            shapes = {tuple(chunk.sizes)[cut] for name, own in chunks.items() if name.endswith(key) for chunk in own}
            assert max(shapes) <= max(tensor.shape[cut] for name, tensor in before.items() if name.endswith(key)) // 2


def stored(folder):
    """Every tensor of a folder except those that are stored twice, and the chunks of each."""
    described = {
        key: entry
        for key, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.TensorStorageMetadata) and not key.startswith(ALIAS)
    }
    found = {key: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype) for key, entry in described.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found, {key: entry.chunks for key, entry in described.items()}


@pytest.mark.slow
def test_the_whole_tool(tmp_path: Path):
    report = tmp_path / "report.json"
    command = [sys.executable, "tools/bench_growth.py", "--disk", tmp_path, "--memory", tmp_path, "--parameters", "2e6"]
    command += ["--smaller", "0", "--memory-parameters", "1e6", "--torch-dist-parameters", "1e6"]
    command += ["--rounds", "1", "--json", report]
    subprocess.run(command, check=True)
    found = json.loads(report.read_text())
    for key in ("throughput_vs_copy", "speedup_vs_ds_to_universal", "peak_anonymous_bytes"):
        assert found[key] > 0
    rows = {row["name"]: row for row in found["races"][0]["contestants"]}
    ours = max(rows[name]["bytes_per_second"] for name in ("incr_ds, 1 workers", "incr_ds, 2 workers"))
    assert found["throughput_vs_copy"] == ours / rows["plain copy"]["bytes_per_second"]
    assert [race["place"] for race in found["races"]] == ["disk", "tmpfs", "disk, torch_dist"]
    assert found["races"][2]["speedup_vs_torch_dcp"] > 0
    names = [row["name"] for row in found["races"][2]["contestants"]]
    assert names[-2:] == ["torch DCP, one process", "torch DCP, 2 ranks"]
    names = [row["name"] for row in found["races"][0]["contestants"]]
    assert names[-3:] == ["plain copy", "ds_to_universal", "load everything"]
