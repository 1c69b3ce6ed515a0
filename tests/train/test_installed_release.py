"""The installed DeepSpeed loads what --target-deepspeed writes for it; `make test-deepspeed` installs others."""

from importlib.metadata import version

import pytest
from truths import same, truth
from universal_engines import load_in_plain_engines

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import LayoutError
from incr_ds.offline.plan import GrowthRequest, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.processes import run_processes

INSTALLED = version("deepspeed")
RELEASE = tuple(map(int, INSTALLED.split("+")[0].split(".")))
RANKS = 2
CASES = {
    "universal-1": {"stage": 1, "bf16": False},
    "universal-2-bf16": {"stage": 2, "bf16": True},
    "universal-3": {"stage": 3, "bf16": False},
    "universal-bf16-optimizer": {"stage": 1, "bf16": True, "bf16_optimizer": True},
    "native-1": {"stage": 1, "bf16": False, "native": True},
    "native-2-bf16": {"stage": 2, "bf16": True, "native": True},
    "native-3-bf16": {"stage": 3, "bf16": True, "native": True},
}
# 0.18.4 gives two kinds of optimizer one name and builds another one for it.
if RELEASE[:2] == (0, 18):
    del CASES["universal-bf16-optimizer"]


def write(folder, source, case):
    """Publish ``source`` for the installed release and a case's engine."""
    layout = {"format": "universal", "zero_stage": case["stage"]}
    if case.get("native"):
        layout = {"format": "deepspeed", "zero_stage": case["stage"], "data_parallel": RANKS}
    layout["dtype"] = "bfloat16" if case["bf16"] else "float32"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("target: {}\n")
    recipe = parse_settings({"target": {}, "layout": layout}, GrowthRecipe, "test")
    request = GrowthRequest(folder, folder / "recipe.yaml", folder / "written", target_deepspeed=INSTALLED)
    grow_checkpoint(plan_files(request, source, recipe))
    return folder / "written"


@pytest.mark.slow
def test_it_loads_what_is_written_for_it(tmp_path):
    """Every parameter was NaN before; what the engine saves afterwards is read back as what it was given."""
    source = truth(tie_word_embeddings=True)
    cases = dict(CASES)
    if RELEASE < (0, 18, 4):
        with pytest.raises(
            LayoutError, match="its ZeRO-3 loader of universal checkpoints restores one parameter group"
        ):
            write(tmp_path / "refused", source, cases.pop("universal-3"))
    cases = {name: {**case, "folder": str(write(tmp_path / name, source, case))} for name, case in cases.items()}
    for found in run_processes(load_in_plain_engines, RANKS, str(tmp_path), cases):
        losses = [engine["loss"] for engine in found.values()]
        assert max(losses) - min(losses) < 0.01 * min(losses)
        for engine in found.values():
            if not engine["native"]:  # a native file's own hyperparameters count
                assert engine["groups"] == [(3e-3, (0.8, 0.95), 0.1), (3e-3, (0.8, 0.95), 0.0)]
            assert engine["global_steps"] == 100
    for name in cases:
        same(open_source(tmp_path / name / f"written-{name}"), source)
