"""What is written for a release of DeepSpeed, and which releases are refused."""

import pytest

from incr_ds.checkpoint.deepspeed.releases import needs_bare_states
from incr_ds.errors import LayoutError


@pytest.mark.parametrize(
    ("version", "universal", "stage", "bare"),
    [
        ("0.19.8", True, 3, False),
        ("0.19.3", True, 3, False),
        ("0.19.2", True, 3, True),
        ("0.18.4+cpu", True, 3, True),
        ("0.18.4", True, 2, False),
        ("0.16.9", True, 1, False),
        ("0.16.9", False, 3, False),
        ("1.0.0", True, 3, False),
    ],
)
def test_form_of_the_states(version, universal, stage, bare):
    assert needs_bare_states(version, universal, stage) is bare


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.18.3", r"0\.18\.3: its ZeRO-3 loader .* restores one parameter group only.*use 0\.18\.4 or newer"),
        ("0.16.8", r"the loaders of releases before 0\.16\.9 are not known"),
        ("newest", r"'newest': expected a release such as 0\.19\.8"),
    ],
)
def test_refused(version, message: str):
    with pytest.raises(LayoutError, match=message):
        needs_bare_states(version, True, 3)
