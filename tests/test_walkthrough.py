"""docs/grow_a_downloaded_model.md, executed: its files and its commands, on a model of few layers that is made here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from incr_ds.checkpoint.integrity import open_described
from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.errors import IncrError
from incr_ds.offline.generation import Sampling, generate_text
from incr_ds.testing.memory import drawn_model
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import free_port
from incr_ds.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "grow_a_downloaded_model.md"
VOCABULARY = 330
SENTENCES = [f"The capital of country {number} is city {number * number % 97}." for number in range(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A model of SmolLM2's widths and two layers, with a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("walk")
    source = folder / "smollm2-135m"
    train_sentencepiece(SENTENCES, VOCABULARY, source)
    sizes = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
    }
    shape = pico_architecture(
        "llama", tied=True, vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=256,
        initializer_range=0.02, **sizes,
    )  # fmt: skip
    drawn_model(shape, torch.float32).save_pretrained(source)
    (folder / "text").mkdir()
    for start in range(0, 600, 10):
        (folder / "text" / f"{start}.txt").write_text("\n".join(SENTENCES[start : start + 10]) * 12)
    return folder


def test_generate_writes_the_same_greedily_and_other_text_when_it_draws(folder):
    source = open_described(folder / "smollm2-135m")
    tokenizer = folder / "smollm2-135m"
    greedy = generate_text(source, tokenizer, "The capital", 12)
    assert greedy.startswith("The capital") and greedy == generate_text(source, tokenizer, "The capital", 12)
    drawn = [
        generate_text(source, tokenizer, "The capital", 12, Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_names_what_it_cannot_use(folder, tmp_path: Path):
    source = open_described(folder / "smollm2-135m")
    with pytest.raises(
        IncrError, match="transformers finds no tokenizer that it can load .*; pass one with --tokenizer"
    ):
        generate_text(source, tmp_path, "x", 3)
    with pytest.raises(IncrError, match="--prompt: the tokenizer gives no tokens for it"):
        generate_text(source, folder / "smollm2-135m", "", 3)


def written_files(text):
    """The YAML blocks that have a file's name."""
    return {name: content for name, content in re.findall(r"```yaml (\S+)\n(.*?)```", text, re.S)}


def commands(text):
    return [line.strip() for line in text.splitlines() if re.match(r"    (python|deepspeed) ", line)]


@pytest.mark.slow
def test_the_page_is_what_happens(folder):
    text = PAGE.read_text()
    for name, content in written_files(text).items():
        (folder / name).write_text(content.replace("num_hidden_layers: 36", "num_hidden_layers: 3"))
    for name in ("tools", "launchers", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    shown = {}
    for line in commands(text):
        words = line.replace("--num_gpus 2", f"--num_gpus 2 --master_port {free_port()}")
        done = subprocess.run(
            words, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        shown.setdefault(line.replace("grown", "smollm2-135m"), []).append(done.stdout)
    assert len(shown) >= 11
    (written,) = [texts for line, texts in shown.items() if "tools/generate.py smollm2-135m" in line]
    assert len(written) == 2 and written[0] == written[1]  # source and grown model write the same
    rows = read_metrics(folder / "runs" / "smollm2-264m" / "metrics.jsonl")
    held_out = [row["loss"] for row in rows if row["kind"] == "evaluation"]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]
    assert json.loads((folder / "smollm2-264m" / "config.json").read_text())["hidden_size"] == 768
