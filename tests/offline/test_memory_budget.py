"""Portions follow from the memory budget; a budget that cannot work is refused with one that can."""

import pytest
import torch

from incr_ds.checkpoint.streaming import BLOCK_ELEMENTS
from incr_ds.errors import ConfigError
from incr_ds.offline.memory_budget import RESERVE, anonymous_bytes, parse_bytes, portion_elements


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5KiB", 1536), ("77", 77), (" 3mib ", 3 << 20)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "2TB", "GiB", "-", "inf", "1e400", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(
        ConfigError, match=rf"^--memory-budget: {text!r}: expected a size such as 2GiB, 500MB or a number of bytes"
    ):
        parse_bytes(text)


def test_anonymous_memory_is_measured():
    before = anonymous_bytes()
    held = torch.ones(25_000_000)
    assert 90 << 20 < anonymous_bytes() - before < 120 << 20
    del held


def test_portions():
    held = 300 << 20
    assert portion_elements(2 << 30, 1, 5000, 128, held) == BLOCK_ELEMENTS
    narrow = held + RESERVE + 4 * 128 * 100_000
    assert portion_elements(narrow, 4, 5000, 128, held) == 100_000
    assert portion_elements(narrow, 4, 100_000, 128, held) == 100_000
    with pytest.raises(ConfigError, match=r"with 4 worker\(s\); it needs --memory-budget (\d+)MiB") as caught:
        portion_elements(narrow, 4, 100_001, 128, held)
    needed = int(str(caught.value).split("--memory-budget ")[1].split("MiB")[0]) << 20
    assert portion_elements(needed, 4, 100_001, 128, held) >= 100_001
