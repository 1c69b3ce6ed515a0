"""Perplexity and bits per byte of text files, and tasks of lm-evaluation-harness, against transformers' own model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from incr_ds.checkpoint.opening import open_source
from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import require
from incr_ds.offline.repetition import checkpoint_repetition_gain
from incr_ds.offline.text_loss import evaluate_text
from incr_ds.testing.memory import drawn_model, small_architecture

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "evaluate.py"
TEXT = "Grow a small model.\nThe large one starts as the small one: 3 > 2, café.\n" * 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A Hugging Face folder with a tokenizer, a text, and a task of four questions."""
    folder = tmp_path_factory.mktemp("home")
    architecture = small_architecture("llama", vocab_size=400)
    train_sentencepiece([(ROOT / "README.md").read_text(), (ROOT / "LICENSE").read_text()], 400, folder / "model")
    drawn_model(architecture, torch.float32).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    questions = [
        {"question": f"{first} and {second} are", "endings": [" two", " three", f" {first + second}"]}
        for first, second in ((1, 2), (3, 4), (5, 6), (7, 8))
    ]
    picks = [picked(folder, item) for item in questions]
    for number, item in enumerate(questions):  # the model is right three times of four
        item["right"] = picks[number] if number else (picks[number] + 1) % 3
    (folder / "tasks").mkdir()
    (folder / "tasks" / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in questions))
    task = {
        "task": "sums", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "questions.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{endings}}", "doc_to_target": "{{right}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}], "metadata": {"version": 1},
    }  # fmt: skip
    (folder / "tasks" / "sums.yaml").write_text(yaml.safe_dump(task))
    return folder


def model_of(home):
    return AutoModelForCausalLM.from_pretrained(home / "model").eval(), AutoTokenizer.from_pretrained(home / "model")


@torch.no_grad()
def log_probabilities(model, ids):
    """Log probabilities of all tokens but the first, each from those before it."""
    return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def picked(home, item):
    """The number of the ending that the model finds most probable after the question, which is all that it is given."""
    model, tokenizer = model_of(home)
    before = tokenizer(item["question"])["input_ids"]
    scores = [
        log_probabilities(model, tokenizer(item["question"] + ending)["input_ids"])[len(before) - 1 :].sum().item()
        for ending in item["endings"]
    ]
    return scores.index(max(scores))


def test_a_text_is_scored_once_and_whole_in_windows(home):
    found = evaluate_text(open_source(home / "model"), home / "model", home / "text.txt", 16)
    model, tokenizer = model_of(home)
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    nats = -sum(log_probabilities(model, ids[start : start + 17]).sum().item() for start in range(0, len(ids) - 1, 16))
    assert found.tokens == len(ids) - 1 and found.tokens % 16 and found.bytes == len(TEXT.encode()) == len(TEXT) + 5
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-5)
    assert found.unknown_tokens == ids.count(tokenizer.unk_token_id)


def test_a_longer_window_predicts_from_more(home):
    checkpoint = open_source(home / "model")
    short, long = (evaluate_text(checkpoint, home / "model", home / "text.txt", length) for length in (1, 10_000))
    assert short.tokens == long.tokens and short.loss != long.loss
    model, tokenizer = model_of(home)
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    assert long.loss == pytest.approx(-log_probabilities(model, ids).mean().item(), rel=1e-5)


def test_the_gain_from_repetition_is_what_the_model_gives(home):
    model, _ = model_of(home)
    once = torch.randint(0, 400, (64, 7), generator=torch.Generator().manual_seed(0))
    losses = -torch.stack([log_probabilities(model, [*row, *row]) for row in once.tolist()])  # [64, 13]
    expected = (losses[:, :6].mean() - losses[:, 7:].mean()).item()
    assert checkpoint_repetition_gain(open_source(home / "model"), 15) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.txt: 0 tokens; expected a text"),
        (b"\xff\xfe", "cannot be read .*utf-8"),
        (None, "cannot be read .No such"),
    ],
)
def test_a_file_that_is_not_text_is_refused(home, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        evaluate_text(open_source(home / "model"), home / "model", tmp_path / "text.txt", 16)


def test_the_tokenizer_of_another_model_is_refused(home, tmp_path):
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"gives token \d+ for .*text.txt, but the model's vocab_size is 101"):
        evaluate_text(open_source(tmp_path / "other"), home / "model", home / "text.txt", 16)


def evaluate(home, *arguments, code=0):
    environment = {**os.environ, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, TOOL, home / "model", *map(str, arguments)],
        capture_output=True, text=True, timeout=250, env=environment, cwd=home,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert code == 0 or "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow  # the harness reads all of its tasks at every start
def test_tasks_and_texts_of_the_tool_are_what_the_model_says(home):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    words = ("--tasks", "sums", "--task-files", home / "tasks", "--text", "text.txt", "--json")
    found = json.loads(evaluate(home, *words))
    assert found["tasks"]["sums"]["acc"] == 0.75
    assert found["text"]["text.txt"]["bytes"] == len(TEXT.encode())
    shown = evaluate(home, *words[:4], "--limit", "1")
    assert shown.splitlines()[-1].startswith("sums, zero-shot: ") and "acc " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected what to evaluate on: --data PREFIX, --text FILE, --tasks NAMES or --repetition"),
        (["--text", "text.txt", "--limit", "3"], "--limit: without effect; it belongs to --tasks"),
        (["--text", "text.txt", "--task-files", "tasks"], "--task-files: without effect"),
        (["--repetition", "--sequence-length", "3"], "--sequence-length 3: --repetition needs 4 tokens or more"),
        (["--tasks", "a,,b"], "--tasks a,,b: expected names with commas between them"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(home, arguments, message):
    assert message in evaluate(home, *arguments, code=2)


def test_a_task_is_what_the_model_says_and_an_unknown_one_is_named(home):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    from incr_ds.offline.tasks import evaluate_tasks

    checkpoint = open_source(home / "model")
    assert evaluate_tasks(checkpoint, home / "model", ["sums"], home / "tasks")["sums"]["acc"] == 0.75
    with pytest.raises(ConfigError, match=r"--tasks: nothing: lm-eval knows [\d,]+ tasks, but .*tasks: sums"):
        evaluate_tasks(checkpoint, home / "model", ["nothing"], home / "tasks")
    with pytest.raises(ConfigError, match=r"--task-files .*nowhere: expected a folder of task files"):
        evaluate_tasks(checkpoint, home / "model", ["sums"], home / "nowhere")


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr("incr_ds.launch.packages._is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=r"^lm-eval is not installed; run pip install 'incr_ds\[eval\]'\.$"):
        require("lm_eval")
    with pytest.raises(ConfigError, match=r"^megatron-core and lm-eval are not .*'incr_ds\[train,eval\]'\.$"):
        require("megatron.core", "lm_eval")
