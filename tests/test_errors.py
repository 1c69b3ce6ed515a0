"""What every message of this package has in common."""

import pickle

import pytest

from incr_ds.errors import CheckpointError, IncrError, LayoutError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain message: é, 漢, 3 x 4.\nIn two lines.", "a plain message: é, 漢, 3 x 4.\nIn two lines."),
        ("refers to t\x1b[2Jrch.bfloat16", r"refers to t\x1b[2Jrch.bfloat16"),
        ("one\rtwo\tthree\x00\x7f\u202e", r"one\rtwo\tthree\x00\x7f\u202e"),
        ("a lone \udc80", r"a lone \udc80"),
    ],
)
def test_what_a_terminal_would_obey_is_an_escape(text, shown):
    assert str(CheckpointError(text)) == shown
    assert shown.encode("utf-8")


def test_an_error_travels_between_processes():
    again = pickle.loads(pickle.dumps(LayoutError("x: \x1b")))
    assert isinstance(again, IncrError) and str(again) == r"x: \x1b"
