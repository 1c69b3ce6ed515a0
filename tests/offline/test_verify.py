"""What verify_checkpoint.py reports: the function is kept, not kept, not meant to be kept, or cannot be compared."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_tool

from incr_ds.checkpoint.opening import open_source
from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.offline.compare import compare, random_batches, stored_dtype, usual_tokens
from incr_ds.offline.sentences import has_tokenizer, sentence_batches
from incr_ds.offline.tolerance import EXACT, ROUNDING_FACTOR
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

WIDER = {"hidden_size": 132, "num_hidden_layers": 5, "intermediate_size": 331}
TOKENS = ("--samples", 2, "--length", 12)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A source in fp32 and one in bf16."""
    folder = tmp_path_factory.mktemp("verify")
    for dtype in (torch.float32, torch.bfloat16):
        drawn_model(small_architecture("llama"), dtype).save_pretrained(folder / str(dtype).removeprefix("torch."))
    return folder


def grown(home, tmp_path, source="float32", dtype="float32", **recipe):
    layout = {"format": "huggingface", "dtype": dtype}
    content = {"target": WIDER, "optimizer": "reset", "layout": layout, **recipe}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    request = ("--source", home / source, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    done = run_tool("grow_checkpoint", *request)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def verified(folder, source, *more):
    shown = run_tool("verify_checkpoint", folder, "--against", source, *TOKENS, *more)
    report = json.loads(run_tool("verify_checkpoint", folder, "--against", source, *TOKENS, *more, "--json").stdout)
    return shown, report


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_a_growth_in_fp32_is_judged_strictly_whatever_its_source_is(home, tmp_path: Path, source):
    shown, report = verified(grown(home, tmp_path, source), home / source)
    assert shown.returncode == 0 and "logits kept" in shown.stdout
    assert f"allowed {EXACT:g}: rounding of fp32 arithmetic" in shown.stdout.replace("0.0001", f"{EXACT:g}")
    assert report["tolerance"] == EXACT and report["relative_difference"] < 1e-5 and report["rounding"] is None


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_a_growth_in_16_bits_is_judged_by_what_rounding_does_to_its_source(home, tmp_path: Path, source):
    shown, report = verified(grown(home, tmp_path, source, "bfloat16"), home / source)
    assert shown.returncode == 0 and "logits kept" in shown.stdout
    assert "3 times the effect of rounding its weights to 16 bits on the source, 0.00" in shown.stdout
    assert 1e-3 < report["rounding"] < 0.03 and report["tolerance"] == ROUNDING_FACTOR * report["rounding"]
    assert 1e-3 < report["relative_difference"] < 2 * report["rounding"]


def test_the_rounding_is_measured_on_the_source_itself():
    """The change, at the weights' own scale or at another one, that moves a logit most."""
    architecture = small_architecture("llama")
    model, batches = drawn_model(architecture, torch.float32), random_batches(101, 2, 12)
    rounded = model_checkpoint(architecture, drawn_model(architecture, torch.float32).to(torch.bfloat16))
    found = compare(model_checkpoint(architecture, model), rounded, batches)
    assert stored_dtype(rounded) == torch.bfloat16
    with torch.no_grad():
        old = torch.cat([model(batch).logits for batch in batches])
        for parameter in model.parameters():
            parameter.data = (parameter.data * 1.37).bfloat16().float() / 1.37
        scaled = torch.cat([model(batch).logits for batch in batches])
    expected = float((old - scaled).abs().max() / old.abs().max())
    assert found.rounding == pytest.approx(max(expected, found.relative_difference), rel=1e-5)


def test_a_growth_that_is_not_function_preserving_by_its_recipe_says_so(home, tmp_path: Path):
    folder = grown(home, tmp_path, recipe="solar", target={"num_hidden_layers": 4})
    shown, report = verified(folder, home / "float32")
    losses = f"{report['source_loss']:.4g} -> {report['target_loss']:.4g}"
    assert shown.returncode == 0 and f"not function-preserving by its recipe: loss {losses}" in shown.stdout
    assert "logits kept" not in shown.stdout and "DIFFER" not in shown.stdout
    assert report["passed"] is True and report["function_preserving"] is False and report["relative_difference"] > 0.1


@pytest.mark.parametrize(("tolerance", "code"), [("0.01", 1), ("5", 0)])
def test_a_stated_tolerance_decides_even_for_such_a_growth(home, tmp_path: Path, tolerance, code):
    folder = grown(home, tmp_path, recipe="solar", target={"num_hidden_layers": 4})
    shown, report = verified(folder, home / "float32", "--tolerance", tolerance)
    assert shown.returncode == code and f"allowed {tolerance}: --tolerance" in shown.stdout
    assert ("logits kept" in shown.stdout) == (code == 0) == report["passed"]


def test_a_changed_model_differs(home, tmp_path: Path):
    other = drawn_model(small_architecture("llama"), torch.float32, seed=1)
    other.save_pretrained(tmp_path / "other")
    shown, report = verified(tmp_path / "other", home / "float32")
    assert shown.returncode == 1 and "LOGITS DIFFER: this is not the source's function" in shown.stdout
    assert report["passed"] is False


def spoiled(folder, value):
    model = drawn_model(small_architecture("llama"), torch.float32)
    model.lm_head.weight.data[:] = value
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("value", "wrong", "verdict"),
    [
        (float("nan"), "target", r"LOGITS CANNOT BE COMPARED: 2,424 of 2,424 logits of the target are not finite"),
        (float("nan"), "source", r"LOGITS CANNOT BE COMPARED: 2,424 of 2,424 logits of the source are not finite"),
        (0.0, "source", r"LOGITS CANNOT BE COMPARED: every logit of the source is zero"),
    ],
)
def test_nan_and_zero_logits_are_reported_not_divided_by(home, tmp_path: Path, value, wrong, verdict):
    bad = spoiled(tmp_path / "bad", value)
    pair = (bad, home / "float32") if wrong == "target" else (home / "float32", bad)
    shown, report = verified(*pair)
    assert shown.returncode == 1 and verdict in shown.stdout and "kept" not in shown.stdout
    assert report["passed"] is False and report["relative_difference"] is None
    shown, _ = verified(*pair, "--tolerance", "5")
    assert shown.returncode == 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer") / "own"
    texts = [f"some words, {number} of them, as a text for a tokenizer of {number % 7} kinds" for number in range(400)]
    train_sentencepiece(texts, 330, folder)
    return folder


def test_sentences_are_the_tokens_where_a_folder_has_a_tokenizer(tokenizer, home, tmp_path: Path):
    architecture = small_architecture("llama", vocab_size=330)
    drawn_model(architecture, torch.float32).save_pretrained(tmp_path / "model")
    assert not has_tokenizer(tmp_path / "model")
    for file in tokenizer.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    source = open_source(tmp_path / "model")
    found = usual_tokens(source, [home / "float32", tmp_path / "model"])
    assert found.origin == "of the built-in sentences"
    assert [batch.shape for batch in found.batches] == [(1, 128)] * 8
    assert torch.equal(torch.cat(found.batches), torch.cat(sentence_batches(tokenizer, 330, 8, 128)))
    shown = run_tool("verify_checkpoint", tmp_path / "model", "--against", tmp_path / "model")
    assert "tokens of the built-in sentences" in shown.stdout and "logits kept" in shown.stdout
    shown = run_tool("verify_checkpoint", tmp_path / "model", "--against", tmp_path / "model", "--samples", 5000)
    assert shown.returncode == 2 and "--samples 5000: the built-in sentences give" in shown.stderr


def test_a_tokenizer_that_does_not_fit_is_said_and_random_tokens_taken(tokenizer, home):
    source = open_source(home / "float32")  # 101 tokens
    found = usual_tokens(source, [tokenizer], samples=2, length=12)
    assert found.origin.startswith(f"drawn at random ({tokenizer}: tokenizer: has token ")
    assert torch.equal(torch.cat(found.batches), torch.cat(random_batches(101, 2, 12)))
    assert (
        usual_tokens(source, []).origin
        == "drawn at random (no tokenizer beside the weights; pass a data set with --data)"
    )


def test_code_in_a_tokenizer_does_not_run_for_the_sentences(tokenizer, home, tmp_path: Path):
    for file in tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    found = usual_tokens(open_source(home / "float32"), [tmp_path], samples=2, length=12)
    assert "needs Python code in the folder" in found.origin and not (tmp_path / "canary").exists()
