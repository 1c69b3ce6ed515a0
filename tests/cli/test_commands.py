"""Every tool is a command of the installed package, too: the same function, the same help, as fast."""

import importlib
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if not path.name.startswith("bench_"))
COMMANDS = {entry.name: entry for entry in distribution("incr_ds").entry_points if entry.group == "console_scripts"}
SLOW = {"torch", "transformers", "deepspeed", "megatron", "matplotlib", "sentencepiece"}
HELP = (
    "import sys\n"
    "from {module} import main\n"
    "sys.argv = ['{tool}.py', '--help']\n"
    "try: main()\n"
    "finally: print(sorted({slow} & set(sys.modules)), file=sys.stderr)\n"
)


def module_of(name):
    return COMMANDS[name].value.partition(":")[0]


def test_each_tool_has_one_command():
    assert sorted(module_of(name) for name in COMMANDS) == [f"incr_ds.cli.{tool}" for tool in TOOLS]
    assert len(COMMANDS) >= 9 and all(name.startswith("incr-") for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tool_runs_its_command(name):
    tool = module_of(name).rpartition(".")[2]
    assert importlib.import_module(tool).main is COMMANDS[name].load()
    assert f'"""The command {name}, by its path."""' in (ROOT / "tools" / f"{tool}.py").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_tools_and_loads_nothing_slow(name):
    """What the installed script prints is what the tool prints, but for its name; neither waits for torch."""
    module = module_of(name)
    tool = module.rpartition(".")[2]
    installed = run(Path(sys.executable).parent / name, "--help")
    by_path = run(sys.executable, "-c", HELP.format(module=module, tool=tool, slow=SLOW))
    assert by_path.stderr == "[]\n"
    assert f"Usage: {name} [OPTIONS]" in installed.stdout and f"Usage: {tool}.py [OPTIONS]" in by_path.stdout
    assert words(installed.stdout, name) == words(by_path.stdout, f"{tool}.py")


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def words(shown, name):
    """Without line breaks: names of other lengths break the line of usage elsewhere."""
    return shown.replace(name, "NAME", 1).split()
