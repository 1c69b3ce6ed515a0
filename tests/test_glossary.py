"""Old names are gone from code and pages, and old keys are refused with the new name (docs/glossary.md)."""

import re
from pathlib import Path

import pytest

from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError

ROOT = Path(__file__).parent.parent
# What stands for what: one word, one meaning.
OLD = {
    r"\bcrew\b": "process group",
    r"\bALONE\b": "SINGLE_PROCESS",
    r"\bheat\b": "temperature",
    r"\bmost_of\b": "max_axis_size",
    r"\bDynamics\b|\b\w+_dynamics\b(?!\.)": "Multipliers",
    r"\boptimizer_groups\.json\b": "multipliers.json",
    r"\b_?[Ll]eanWalk\b|backend: lean\b|\"lean\"": "recompute",
    r"\bShardedTensor\b|\bModuleParameter\b": "RankParameter",
    r"(\b|\\n)optimizer: (exact|keep)\b": "optimizer: rescale, copy",
    r"(\b|\\n)exact: (required|preferred)\b": "function_preserving",
    r"\bincr_ds[./](source|target|crew|grow|grown|verify|command|reading)\b(?!_)": "today's packages",
}
# They say what an old name has become.
ALLOWED = {
    "docs/DECISIONS.md",
    "tests/test_glossary.py",
    "incr_ds/arch/multipliers.py",
    "incr_ds/config/training.py",
    "tests/arch/test_multipliers.py",
}
BENCHMARK = "bench_dynamics"  # measures how closely a grown model's training follows its source's: its dynamics


# Phrases that code avoids in messages, comments and docstrings, and what to write instead.
UNCLEAR = {
    r"(?<![Tt]here )\bis no [a-z]": "is not a valid",
    r"\btold\b": "reported, printed, given",
    r"\bfor people\b": "readable, for users",
    r"\b(not to|cannot) be had\b": "not available",
    r"\b[Ww]ho(so)?ever\b": "name the user, process or function",
    r"\b[Ww]hat does not fit\b": "name what is checked",
    r'"""(Of|By|So|Were) [a-z]': "start with what it is or does: a noun phrase or a verb",
    r", of which\b": "say it in two sentences",
    r"\bto who\b|\bis everybody's\b": "name the user, process or function",
}


def texts():
    for folder in ("incr_ds", "tools", "launchers", "ds_configs", "docs", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".md", ".sh", ".sbatch") and str(path.relative_to(ROOT)) not in ALLOWED:
                yield path
    yield ROOT / "README.md"


@pytest.mark.parametrize("old", OLD)
def test_old_names_are_gone(old):
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:100]}"
        for path in texts()
        for line in path.read_text().replace(BENCHMARK, "").splitlines()
        if re.search(old, line)
    ]
    assert not found, f"{OLD[old]}: {found}"


@pytest.mark.parametrize("phrase", UNCLEAR)
def test_code_avoids_unclear_phrases(phrase):
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()[:100]}"
        for folder in ("incr_ds", "tools", "launchers", "ds_configs", "tests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".yaml", ".sh", ".sbatch", ".cu", ".cuh") and path != Path(__file__)
        for line in path.read_text().splitlines()
        if re.search(phrase, line)
    ]
    assert not found, f"{UNCLEAR[phrase]}: {found}"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (GrowthRecipe, {"target": {}, "exact": "required"}, "exact: this key is function_preserving now"),
        (GrowthRecipe, {"target": {}, "optimizer": "exact"}, "optimizer: exact is rescale now"),
        (GrowthRecipe, {"target": {}, "optimizer": "keep"}, "optimizer: keep is copy now"),
        (RunSettings, {"loss": {"backend": "lean"}}, "loss.backend: lean is recompute now"),
    ],
)
def test_old_keys_are_refused_with_the_new_name(kind, content, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_settings(content, kind, "test")
