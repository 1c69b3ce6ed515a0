"""README and docs name only what exists: paths, links, commands and their options, recipe and run-file keys."""

import importlib
import re
import shlex
from importlib.metadata import distribution
from pathlib import Path

import pytest
import typer
import yaml

from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.training import RunSettings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The first folder of each path that the text may name; what a run makes (runs/, grown) is not in the repository.
OURS = ("incr_ds/", "tools/", "launchers/", "ds_configs/", "tests/", "docs/")


def commands():
    lines = [line.strip() for line in README.splitlines() if line.startswith("    python tools/")]
    assert len(lines) >= 8
    return lines


@pytest.mark.parametrize("line", commands(), ids=lambda line: line.split()[1])
def test_commands_parse(line):
    """Every tool line of the README has the options and the number of arguments that the tool takes."""
    _, script, *words = shlex.split(line)
    assert (ROOT / script).is_file()
    module = importlib.import_module(Path(script).stem)
    app = typer.Typer()
    app.command()(module.main.__wrapped__)
    typer.main.get_command(app).make_context(script, words, resilient_parsing=False)


def test_every_tool_is_shown():
    shown = {line.split()[1].removeprefix("tools/") for line in commands()}
    assert {path.name for path in (ROOT / "tools").glob("*.py") if not path.name.startswith("bench_")} <= shown


def test_every_command_is_named():
    commands = [entry.name for entry in distribution("incr_ds").entry_points if entry.group == "console_scripts"]
    assert set(commands) == set(re.findall(r"`(incr-[\w-]+)`", README))


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    for path in re.findall(r"[\w./*-]+/[\w./*-]+", text):
        if path.startswith(OURS):
            assert list(ROOT.glob(path.rstrip("./"))), path


def anchors(page):
    """The anchor that GitHub gives each heading: in lower case, without punctuation, with a dash for each space."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors(page):
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text()):
        assert anchor in anchors(page.parent / link if link else page), f"{link}#{anchor}"


def test_every_decision_is_in_the_index():
    page = ROOT / "docs" / "DECISIONS.md"
    entries = [anchor for anchor in anchors(page) if re.match(r"\d{4}-\d\d-\d\d", anchor)]
    assert len(entries) > 40
    assert sorted(re.findall(r"\]\(#([^)]*)\)", page.read_text())) == sorted(entries)


@pytest.mark.parametrize(("page", "kind"), [("recipe.md", GrowthRecipe), ("run_file.md", RunSettings)])
def test_documented_settings_are_valid_and_complete(page, kind):
    """The example of the page parses, and every key that exists is named on the page."""
    text = (ROOT / "docs" / page).read_text()
    example = re.search(r"```yaml\n(.*?)```", text, re.S)[1]
    parse_settings(yaml.safe_load(example), kind, page)
    for key in keys(kind):
        assert re.search(rf"\b{key}\b", text), f"{page} does not name {key}"


def keys(kind):
    for name, field in kind.model_fields.items():
        yield name
        for part in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if hasattr(part, "model_fields"):
                yield from keys(part)
