"""Imports go one way: a module may import what stands above it in this list, never below; lazy imports count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "incr_ds"

# From the ground up. `command` and `tables` serve command lines; `export` is the second offline story.
ORDER = [
    "errors",
    "reading",
    "crew",
    "launched",
    "command",
    "texts",
    "config",
    "published",
    "arch",
    "source",
    "growth",
    "target",
    "integrity",
    "runs",
    "advice",
    "companions",
    "grow",
    "grown",
    "export",
    "verify",
    "generate",
    "suggest",
    "difference",
    "tables",
    "grow_command",
    "data",
    "kernels",
    "losses",
    "bench",
    "model",
    "launch",
    "train",
    "study",
    "study_report",
    "testing",
]
SIBLINGS = {"source", "growth", "target"}
DISTRIBUTED = {"losses", "model", "train", "testing", "launched"}
DEEPSPEED = {"model", "train"}
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60
# Triton's language has no modules of its own: what its kernels share stands in their file.
LONGEST_KERNEL_MODULE = 600
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    if path == PACKAGE / "__init__.py":
        return
    part = part_of(path)
    for name in imports(path):
        if name.startswith("incr_ds."):
            used = name.split(".")[1]
            if used == part:
                continue
            assert ORDER.index(used) < ORDER.index(part), f"{path} imports {name}"
            assert not {used, part} <= SIBLINGS, f"{path} imports its sibling {name}"
        if name.split(".")[0] == "deepspeed":
            assert part in DEEPSPEED, f"{path} imports {name}"
        if name.startswith("torch.distributed"):
            assert part in DISTRIBUTED, f"{path} imports {name}"
        if name.split(".")[0] == "triton":
            assert part == "kernels", f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= (LONGEST_KERNEL_MODULE if part_of(path) == "kernels" else LONGEST_MODULE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= LONGEST_FUNCTION, f"{path}: {node.name}"


def test_every_part_is_in_the_order():
    parts = {part_of(path) for path in MODULES} - {"__init__"}
    assert parts == set(ORDER)
