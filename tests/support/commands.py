"""Commands, run in the process of the test."""

import importlib
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

import pytest


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run_tool(name, *arguments):
    """Run a tool as its command line does, in this process: starting Python and torch costs seconds."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            importlib.import_module(name).main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())
