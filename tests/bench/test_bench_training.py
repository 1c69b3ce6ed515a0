"""The training benchmark: every loop trains the same model on the same tokens, and the summary's ratios are of them."""

import json
from pathlib import Path

import bench_training
import pytest
import torch
from bench_training import OURS, PIPELINE, PLAIN, SHARED, TAUGHT, Work

from incr_ds.testing.processes import run_processes

SMALL = Work(vocabulary=64, sequence_length=8, micro_batch=2, micro_batches=4, rounds=1, threads=1)


def losses(work):
    """The first loss of the plain loop and of ours from the same weights, and the tokens that each contestant reads."""
    import torch.distributed as dist
    from deepspeed import DeepSpeedEngine

    from incr_ds.train.engine import TrainingEngine

    engines, found = [], []
    initialize, train = DeepSpeedEngine.__init__, TrainingEngine.train_step

    def remembered(self, *arguments, **options):
        initialize(self, *arguments, **options)
        engines.append(self)

    def recorded(self, *arguments, **options):
        result = train(self, *arguments, **options)
        found.append(result.ce)
        return result

    DeepSpeedEngine.__init__, TrainingEngine.train_step = remembered, recorded
    contestants = {name: bench_training.CONTESTANTS[name](work) for name in (PLAIN, OURS)}
    plain, ours = engines
    weights = dict(ours.module.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.module.named_parameters():
            parameter.copy_(weights[name])
    batches, whole, shared = (
        bench_training.read_batches(name, work, 0, dist.get_rank()) for name in (OURS, PIPELINE, SHARED)
    )
    expected = torch.stack(
        [plain(input_ids=ids, labels=labels, shift_labels=labels).loss for ids, labels in batches]
    ).mean()
    dist.all_reduce(expected)
    contestants[OURS](batches)
    read = [[ids.tolist() for ids, _ in micro_batches] for micro_batches in (batches, whole, shared)]
    return expected.item() / 2, found[0], *read


def test_the_plain_loop_and_ours_train_the_same_model_on_the_same_tokens():
    first, second = run_processes(losses, 2, SMALL)
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert sorted(first[2] + second[2]) == sorted(first[3]) and first[3] == second[3]
    halves = [[one + other for one, other in zip(*pair, strict=True)] for pair in zip(first[4], second[4], strict=True)]
    assert halves == first[3]


def test_the_summary_compares_what_it_says():
    spent = {PLAIN: (2.0, 1.5), OURS: (2.2, 1.6), TAUGHT: (2.42, 1.7), PIPELINE: (2.1, 2.5), SHARED: (2.3, 2.0)}
    peaks = {PLAIN: 100, OURS: 120, TAUGHT: 130, PIPELINE: 90, SHARED: 60}
    found = {name: {"cpu_seconds": cpu, "wall_seconds": wall} for name, (cpu, wall) in spent.items()}
    startup = {"run": {"seconds": 6.0, "to_step_1": 7.0}, "imports_and_model": {"seconds": 5.0}}
    twice = {name: {kind: 2 * seconds for kind, seconds in times.items()} for name, times in found.items()}
    slower = {**found, OURS: {"cpu_seconds": 3.0, "wall_seconds": 1.6}}
    summary = bench_training._summary(SMALL, [twice, slower, found], peaks, startup)
    assert summary["time_vs_plain"] == pytest.approx(1.1)
    assert summary["lowest_and_highest"]["time_vs_plain"] == pytest.approx([1.1, 1.5])
    assert summary["contestants"][PLAIN]["cpu_seconds"] == 2.0
    assert summary["distillation_time_ratio"] == pytest.approx(1.1)
    assert summary["pipeline_vs_bubble_bound"] == pytest.approx(2.5 / (1.6 * 5 / 4))
    assert summary["startup_vs_imports"] == pytest.approx(1.2)
    assert summary["peak_memory_vs_plain"] == pytest.approx(1.2)
    assert summary["shared_samples"] == {"time": pytest.approx(1.25), "peak_memory": pytest.approx(0.5)}
    assert summary["contestants"][PIPELINE] == {"cpu_seconds": 2.1, "wall_seconds": 2.5, "peak_bytes": 90}
    # By hand: 2 operations per weight of the matrices and attention's 4 S H a layer; the student's backward is two more.
    length, student, teacher = 8, (256, 704, 6), (128, 352, 3)

    def forward(hidden, ffn, layers):
        return 2 * (layers * (4 * hidden * hidden + 3 * hidden * ffn) + 64 * hidden) + layers * 4 * length * hidden

    share = forward(*teacher) / (3 * forward(*student))
    assert summary["teacher_flops_share"] == pytest.approx(share, rel=0.02)


@pytest.mark.slow
def test_the_whole_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    sizes = "--vocabulary 64 --sequence-length 8 --micro-batches 2 --rounds 1 --pairs 2 --starts 1".split()
    monkeypatch.setattr("sys.argv", ["bench_training.py", "--output", str(tmp_path), *sizes, "--json"])
    with pytest.raises(SystemExit) as ended:
        bench_training.main()
    assert ended.value.code == 0
    found = json.loads((tmp_path / "bench_training.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["startup_vs_imports"] > 1 and set(found["contestants"]) == {PLAIN, OURS, TAUGHT, PIPELINE, SHARED}
    assert all(contestant["peak_bytes"] > 0 for contestant in found["contestants"].values())
    assert "| plain loop |" in (tmp_path / "bench_training.md").read_text()
