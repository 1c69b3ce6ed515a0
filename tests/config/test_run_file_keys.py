"""The page of keys is what the classes say, and every key has a description."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from incr_ds.config.reference import _sections, page
from incr_ds.config.training import RunSettings

ROOT = Path(__file__).parents[2]
SECTIONS = dict(_sections(RunSettings, "the run file"))


def test_the_page_is_the_one_that_is_written():
    written = (ROOT / "docs" / "run_file_keys.md").read_text()
    assert written == page(), "run: python -m incr_ds.config.reference > docs/run_file_keys.md"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_has_a_description(title: str):
    section: type[BaseModel] = SECTIONS[title]
    assert not [name for name, field in section.model_fields.items() if not field.description]


def test_types_defaults_and_bounds_are_those_of_the_schema():
    rows = page().splitlines()
    for row in (
        "| `output` | text | — | The folder of everything that the run writes. |",
        "| `keep_steps` | list of integer ≥ 1 | `[]` | Further steps at which to save. These checkpoints are never deleted. |",
        "| `betas` | number and number | `[0.9, 0.95]` | AdamW's two decay factors. |",
        "| `seed` | integer ≥ 0, < 4,294,967,296 | `0` | The seed of fresh weights, of the order of samples and of dropout. |",
    ):
        assert row in rows
    assert {"model", "model.initialize_from", "data.train", "growth", "distillation"} <= set(SECTIONS)
