"""The model card of an export: what it states, what it leaves open, and a card that the source had."""

import json
import re

import pytest
import torch
import yaml
from run_folders import write_checkpoint

from incr_ds.checkpoint.huggingface.card import Card
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.provenance import Link, provenance
from incr_ds.checkpoint.publish import publish, read_manifest, verify_manifest
from incr_ds.errors import CheckpointError
from incr_ds.testing.memory import drawn_model, small_architecture


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(folder)
    return folder


def export(source, name="exported"):
    output = source.parent / name
    notes = export_huggingface(open_source(source), output, torch.float32, source)
    verify_manifest(output)
    return output, notes


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_names_the_model_and_leaves_the_licence_open(source):
    output, notes = export(source)
    text = (output / "README.md").read_text()
    assert header(text) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["incr_ds"]}
    assert "# llama, 277,536 parameters" in text and "| dtype | float32 |" in text and "| hidden | 96 |" in text
    assert "# license: NAME" in text and "**Not stated.** Write it here, and as `license` in the header" in text
    assert f"- `{source}`\n  - `without a manifest: incr_ds did not write it`" in text
    assert notes == () and read_manifest(output)["facts"]["exported_from"] == str(source)
    assert [link.kind for link in provenance(output)] == ["huggingface export", ""]


def test_a_card_of_the_source_is_kept_and_said(source):
    (source / "README.md").write_text("---\nlicense: mit\n---\nOurs.\n")
    output, notes = export(source)
    assert (output / "README.source.md").read_text() == "---\nlicense: mit\n---\nOurs.\n"
    assert notes == (
        "the source's own README.md is kept as README.source.md; the new README.md describes this export, without a licence",
    )
    assert notes[0] in (output / "README.md").read_text() and read_manifest(output)["facts"]["notes"] == list(notes)
    (source / "README.md").write_bytes(b"\xff")
    with pytest.raises(
        CheckpointError, match=r"README.md: cannot be read .*an export keeps it as README.source.md: repair"
    ):
        export(source, "other")
    assert not (source.parent / "other").exists()


def test_the_card_of_a_grown_and_trained_model_has_its_whole_way(tmp_path):
    first = write_checkpoint(tmp_path / "small", 8)
    recipe = {"target": {"hidden_size": 144}, "optimizer": "rescale"}
    facts = {
        "recipe": recipe, "function_preserving": True, "notes": [],
        "source": {"folder": str(first), "kind": "deepspeed zero-1", "step": 8, "parameters": 1000},
        "target": {"parameters": 2500},
    }  # fmt: skip
    with publish(tmp_path / "grown", "deepspeed checkpoint, grown", facts):
        pass
    newest = write_checkpoint(tmp_path / "run", 20, model={"initialize_from": str(tmp_path / "grown")}, seed=7)
    text = Card(small_architecture("llama"), "bfloat16", provenance(newest)).text
    places = [
        text.index(part) for part in (f"`{newest}`", f"`{tmp_path}/grown`", f"`{first}`", "fresh weights of pico")
    ]
    assert places == sorted(places)
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    assert blocks[0] == recipe and blocks[1]["seed"] == 7 and blocks[1]["batch"]["global_batch_size"] == 4
    assert "So far: `flops 20000000.0, stage 0, step 20, tokens 2000`." in text
    assert f"- `corpus`: `{'f' * 64}`" in text and "| `torch` |" in text
    assert "by a recipe that keeps the function; the source is a deepspeed zero-1 at step 8" in text


def test_text_of_files_stays_in_code():
    hostile = "a```\n# title | <script>alert(1)</script>\n[x](http://example.org) `"
    links = [Link(hostile, hostile, {"recipe": {"name": hostile}, "data": {hostile: hostile}})]
    text = Card(small_architecture("llama"), "float32", links, [hostile]).text
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.S | re.M)  # blocks
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)  # spans of a line
    assert "script" in text and not {"script", "example.org"} & set(re.findall(r"script|example\.org", outside))
    assert not re.search("^# title", outside, re.M)


def test_facts_that_are_damaged_make_no_card_fail():
    links = [
        Link("a", "k", {"position": {"step": "x"}, "settings": {"model": 3, "seed": 1}, "source": {"folder": 5}}),
        Link("b", "k", {"recipe": {}, "source": {"kind": None}, "target": {}, "notes": 3, "settings": {"model": {}}}),
    ]
    assert "grown from an unknown number of" in Card(small_architecture("llama"), "float32", links).text


def test_a_chain_that_leads_back_to_itself_ends(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        with publish(tmp_path / name, "huggingface export", {"exported_from": str(tmp_path / other)}):
            pass
    assert [link.folder for link in provenance(tmp_path / "a")] == [str(tmp_path / "a"), str(tmp_path / "b")]
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({"manifest_version": 2}))
    last = provenance(tmp_path / "a")[-1]
    assert "its manifest cannot be used" in last.problem and last.lines == [last.problem]
