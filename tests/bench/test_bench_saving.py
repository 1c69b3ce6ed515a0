"""The saving benchmark: all contestants save the same states, and the summary's ratios are of what it says."""

import json
from pathlib import Path

import bench_saving
import pytest
from bench_saving import AT_ONCE, BACKGROUND, COPY, DEEPSPEED, DISK, Work

SPENT = {COPY: (0.5, 0.5), DISK: (1.0, 1.0), DEEPSPEED: (2.0, 2.0), AT_ONCE: (3.0, 3.0), BACKGROUND: (0.75, 4.0)}


def test_the_summary_compares_what_it_says():
    spent = {
        name: {
            "waits_seconds": waits,
            "complete_seconds": complete,
            "step_seconds": 0.5 if name == BACKGROUND else None,
        }
        for name, (waits, complete) in SPENT.items()
    }
    found = {"bytes": 4_500_000_000, "step_seconds": 0.25, "spent": spent}
    summary = bench_saving._summary(Work(16, 2, 32, 1), found)
    # By hand: the embedding and the head, 4 H^2 of attention and 12 H^2 of the FFN a layer, 2 norms a layer and the last.
    assert summary["parameters"] == 2 * 32 * 16 + 2 * 16 * 16 * 16 + 5 * 16
    assert (summary["at_once_vs_deepspeed"], summary["background_vs_at_once"]) == (1.5, 0.25)
    assert summary["background_vs_copy"] == 1.5
    assert bench_saving._rows(summary)[-1] == (BACKGROUND, "0.75", "6.00", "4.00", "0.50")
    assert bench_saving._rows(summary)[2] == (DEEPSPEED, "2.00", "2.25", "2.00", "")


@pytest.mark.slow
def test_the_whole_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    sizes = ["--hidden-size", "16", "--layers", "2", "--vocabulary", "32", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["bench_saving.py", "--output", str(tmp_path), *sizes, "--json"])
    with pytest.raises(SystemExit) as ended:
        bench_saving.main()
    assert ended.value.code == 0
    found = json.loads((tmp_path / "bench_saving.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    # Masters and two moments in fp32 on both ranks, and the weights.
    assert 16 * found["parameters"] < found["bytes"] < 16 * found["parameters"] + 200_000
    assert all(times["waits_seconds"] > 0 for times in found["spent"].values())
    assert found["spent"][BACKGROUND]["complete_seconds"] > found["spent"][BACKGROUND]["waits_seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"bench_saving.json", "bench_saving.md"}
