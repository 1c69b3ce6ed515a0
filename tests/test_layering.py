"""Imports go one way: a module may import what stands above it in this list, never below; lazy imports count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "incr_ds"

ORDER = [
    ["errors", "config", "arch", "sharding"],
    ["checkpoint.base", "checkpoint.parents", "checkpoint.lock", "checkpoint.sink", "checkpoint.streaming"],
    [
        "checkpoint.torch_file",
        "checkpoint.manifest",
        "checkpoint.publish",
        "checkpoint.workspace",
        "checkpoint.companions",
        "checkpoint.runs",
        "checkpoint.provenance",
    ],
    ["checkpoint.naming", "checkpoint.progress", "checkpoint.assembly", "checkpoint.finite"],
    ["checkpoint.huggingface", "checkpoint.deepspeed", "checkpoint.universal", "checkpoint.megatron_core"],
    ["checkpoint.opening", "checkpoint.integrity", "checkpoint.difference"],
    ["growth"],
    ["offline"],
    ["data", "kernels", "losses", "model"],
    ["launch", "train.metrics", "report", "train", "study"],
    ["cli", "testing", "bench"],
]
PLACES = [place for line in ORDER for place in line]
ONLY_FROM_CHECKPOINT = {"growth": "checkpoint.base"}  # growth reads logical checkpoints, whatever their format
DISTRIBUTED = ("losses", "model", "train", "testing", "offline.launcher", "offline.process_group")
DISTRIBUTED_FILES = ("checkpoint.megatron_core.index",)  # the classes of a file format
DEEPSPEED = ("model", "train")
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60
# Triton's language has no modules of its own: what its kernels share stands in their file.
LONGEST_KERNEL_MODULE = 600
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def place_of(module):
    """The entry of the order that a module belongs to; None for a package that the order names by its modules."""
    return next((place for place in PLACES if f"{module}.".startswith(f"{place}.")), None)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    module = module_of(path)
    own = place_of(module)
    if own is None:  # a package's own file: it imports nothing
        assert not [name for name in imports(path) if name.startswith("incr_ds.")], path
        return
    for name in imports(path):
        if name.startswith("incr_ds."):
            used = place_of(name.removeprefix("incr_ds."))
            assert PLACES.index(used) <= PLACES.index(own), f"{path} imports {name}"
            only = ONLY_FROM_CHECKPOINT.get(own)
            assert only is None or not used.startswith("checkpoint") or used == only, f"{path} imports {name}"
        if name.split(".")[0] == "deepspeed":
            assert own in DEEPSPEED, f"{path} imports {name}"
        if name.startswith("torch.distributed"):
            allowed = (*DISTRIBUTED, *(DISTRIBUTED_FILES if name.startswith("torch.distributed.checkpoint") else ()))
            assert f"{module}.".startswith(tuple(f"{place}." for place in allowed)), f"{path} imports {name}"
        if name.split(".")[0] == "triton":
            assert own == "kernels", f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= (LONGEST_KERNEL_MODULE if place_of(module_of(path)) == "kernels" else LONGEST_MODULE)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno <= LONGEST_FUNCTION, f"{path}: {node.name}"


def test_the_order_names_every_module_and_only_those():
    modules = {module_of(path) for path in MODULES if path.name != "__init__.py"}
    assert {module for module in modules if place_of(module) is None} == set()
    assert {place for place in PLACES if not any(f"{module}.".startswith(f"{place}.") for module in modules)} == set()


def test_only_errors_stand_at_the_top():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "errors.py"}


def test_a_class_name_stands_for_one_thing():
    homes = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module_of(path))
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
