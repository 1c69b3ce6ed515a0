"""The tensor files of grown checkpoints keep their bytes: every layout, source and optimizer mode, against bytes.json.

A change of code that is meant to change no byte leaves this test green. One that is meant to change bytes says so in
CHANGELOG.md and writes the file anew: ``python tests/offline/test_stable_bytes.py``.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import xxhash

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.offline.plan import GrowthRequest, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

KNOWN = Path(__file__).with_name("bytes.json")
LAYOUTS = {
    "zero-1": {"data_parallel": 2},
    "zero-2 bf16": {"data_parallel": 3, "zero_stage": 2, "dtype": "bfloat16"},
    "zero-3": {"data_parallel": 2, "zero_stage": 3},
    "zero-3 small groups": {"data_parallel": 2, "zero_stage": 3, "sub_group_size": 3000, "dtype": "bfloat16"},
    "three dimensions": {"tensor_parallel": 3, "pipeline_parallel": 2, "data_parallel": 2},
    "universal": {"format": "universal"},
    "universal pipeline": {"format": "universal", "pipeline_parallel": 2},
    "megatron": {"modules": "megatron-deepspeed", "tensor_parallel": 3, "pipeline_parallel": 2},
    "megatron universal": {"modules": "megatron-deepspeed", "format": "universal"},
    "torch_dist": {"format": "torch_dist", "tensor_parallel": 3, "dtype": "bfloat16"},
    "torch": {"format": "torch", "tensor_parallel": 3, "pipeline_parallel": 5, "transformer_impl": "local"},
    "torch distributed": {"format": "torch", "distributed_optimizer": True, "dtype": "bfloat16"},
    "huggingface": {"format": "huggingface"},
    "huggingface bf16": {"format": "huggingface", "dtype": "bfloat16"},
}
GROWN = {"hidden_size": 36, "num_hidden_layers": 5, "intermediate_size": 75, "num_attention_heads": 12}
RECIPES = {
    "same": {"target": {}},
    "grown": {"target": GROWN | {"num_key_value_heads": 6}},
    "copied moments": {"target": GROWN, "optimizer": "copy", "depth": {"method": "stack", "new": "copy"}},
    "reset-new": {"target": GROWN, "optimizer": "reset-new", "width": {"hidden": "zero", "ffn": {"new": "copy"}}},
    "reset": {"target": GROWN, "optimizer": "reset", "width": {"symmetry_breaking": {"method": "noise"}}},
}
FAMILIES = {"gpt2": {"pipeline_parallel": 2}, "gemma2": {"tensor_parallel": 3}, "qwen3_moe": {"data_parallel": 2}}


def write(folder, source, recipe, layout):
    """Publish a growth in ``folder``."""
    recipe_file = folder.with_name(f"{folder.name}.yaml")
    recipe_file.write_text("target: {}\n")
    settings = parse_settings({**recipe, "layout": layout}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder.parent, recipe_file, folder), source, settings))


def digest(folder):
    found = xxhash.xxh3_64()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".pt", ".safetensors", ".distcp"):
            found.update(f"{path.relative_to(folder)}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def digests(case, home):
    """Digests of a growth from memory, and of a growth from the files just written, so that readers are covered, too."""
    kind, _, name = case.partition(": ")
    if kind == "family":
        source, recipe, layout = SyntheticCheckpoint(small_architecture(name)), {"target": {}}, FAMILIES[name]
    else:
        source, recipe = SyntheticCheckpoint(pico_architecture()), RECIPES[name if kind == "recipe" else "grown"]
        layout = LAYOUTS[name] if kind == "layout" else {"data_parallel": 2, "pipeline_parallel": 2}
    write(home / "first", source, recipe, layout)
    opened = open_source(home / "first")
    mode = "reset" if len(opened.facts.states) == 1 else "rescale"
    layout = {"format": "huggingface" if mode == "reset" else "universal"}
    write(home / "again", opened, {"target": {}, "optimizer": mode}, layout)
    return [digest(home / "first"), digest(home / "again")]


CASES = [
    *(f"layout: {name}" for name in LAYOUTS),
    *(f"recipe: {name}" for name in RECIPES),
    *(f"family: {name}" for name in FAMILIES),
]


# A layout or a family is enough for each way of writing and reading; what differs in dtype or degrees only is slow.
SLOW = {"layout: zero-2 bf16", "layout: universal pipeline", "layout: huggingface bf16", "recipe: same", "family: gpt2"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_bytes_are_what_they_were(case, tmp_path: Path):
    assert digests(case, tmp_path) == json.loads(KNOWN.read_text())[case]


def main():
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as home:
            found[case] = digests(case, Path(home))
    KNOWN.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} cases: {KNOWN}", file=sys.stderr)


if __name__ == "__main__":
    main()
