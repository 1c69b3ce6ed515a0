"""The benchmark of data preparation: its rival writes the same data set, and the race reports both."""

import json
from pathlib import Path

import bench_prepare_data
import pytest
from bench_prepare_data import same_bytes, train_byte_level

TEXTS = [f"def f_{number}(x):\n    return x * {number}  # é漢\n" for number in range(200)]


def test_the_rival_writes_the_same_bytes(tmp_path: Path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "x.jsonl").write_text(lines)
    tokenizer = train_byte_level(tmp_path / "tokenizer", "".join(TEXTS))
    assert same_bytes(tmp_path / "x.jsonl", tokenizer, tmp_path, 2)
    (tmp_path / "y.jsonl").write_text(lines + '{"text": "<|endoftext|>"}\n')
    assert not same_bytes(tmp_path / "y.jsonl", tokenizer, tmp_path, 2), "its tool makes tokens of such text"


@pytest.mark.slow
def test_both_programs_are_reported(tmp_path: Path, monkeypatch, capsys):
    sizes = ["--max-bytes", "400000", "--workers", "2", "--rounds", "1", "--note", "A test."]
    monkeypatch.setattr("sys.argv", ["bench_prepare_data.py", "--output", str(tmp_path), *sizes, "--json"])
    with pytest.raises(SystemExit) as ended:
        bench_prepare_data.main()
    assert not ended.value.code
    report = json.loads((tmp_path / "bench_prepare_data.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert [entry["same_bytes"] for entry in report["races"]] == [True, True]
    page = (tmp_path / "bench_prepare_data.md").read_text()
    for entry in report["races"]:
        assert [row["program"] for row in entry["programs"]] == [
            "incr_ds, 2 workers",
            "megatron-core's method, 2 workers",
        ]
        assert all(row["seconds"] > 0 and row["peak_anonymous_bytes"] > 1 << 20 for row in entry["programs"])
        assert f"| {entry['tokenizer']} | incr_ds, 2 workers |" in page
    assert report["rival"] in page.replace("\n", " ") and "A test." in page
    assert all(len(line) < 120 for line in page.splitlines() if not line.startswith("|"))
