"""Runs commands while one of their calls that change files fails. Started with failing_io.c as LD_PRELOAD."""

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ERRORS = {"EIO": errno.EIO, "EROFS": errno.EROFS}
MOST = {"training": 12}  # calls that fail one by one; of more, evenly spaced ones


def build(folder):
    library = folder / "failing_io.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def run_cases(library, material, folder, names):
    """Every outcome of the commands ``names``, as dictionaries."""
    root = Path(__file__).parents[2]
    paths = ":".join(str(path) for path in (root, root / "tools", root / "tests" / "support"))
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, library, material, folder, *names], capture_output=True, text=True, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert done.returncode == 0, done.stderr[-3000:]
    return lines


def _commands(material):
    from commands import run_tool
    from fault_runs import run_content, train_each

    grow = ["--source", material / "source", "--recipe", material / "recipe.yaml", "--workers", 1, "--output"]
    data = ["--input", material / "text", "--tokenizer", "train:sentencepiece", "--vocab-size", 330, "--output"]

    def train(output):
        alone = {"layout": {"data_parallel": 1, "zero_stage": 1}, "growth": [], "evaluation": None}
        alone |= {"checkpoint": {"interval": 2, "keep_last": 1, "max_failures": 0}}
        schedule = {"train_steps": 4, "learning_rate": 1e-2, "warmup_steps": 2}
        (error,) = train_each([run_content(material, output, schedule=schedule, **alone)])
        return error

    def tool(*words):
        done = run_tool(*map(str, words))
        shown = done.stdout + done.stderr
        if "Traceback" in shown:
            raise AssertionError(shown)
        return None if done.returncode == 0 else f"{done.returncode}: {shown}"

    return {
        "grow_checkpoint": lambda output: tool("grow_checkpoint", *grow, output / "made"),
        "export_huggingface": lambda output: tool("export_huggingface", material / "source", output / "made"),
        "prepare_data": lambda output: tool("prepare_data", *data, output / "text"),
        "training": train,
    }


def _published(output, name):
    """What a user would take for a result."""
    found = output / "checkpoints" if name == "training" else output
    return sorted(path.name for path in found.glob("*") if not path.name.startswith(".")) if found.exists() else []


def _main(library, material, folder, *names):
    hook = ctypes.CDLL(library)
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
    }
    from incr_ds.testing.processes import free_port

    os.environ["MASTER_PORT"] = str(free_port())
    commands = _commands(Path(material))
    for name in names:
        calm = Path(folder) / f"{name}-calm"
        calm.mkdir()
        hook.fault_arm(str(calm).encode(), 0, 0)
        error = commands[name](calm)
        calls = hook.fault_count()
        assert error is None and calls, (name, error, calls)
        step = max(1, calls // MOST.get(name, 60))
        for number in range(1, calls + 1, step):
            for kind in ERRORS if number % 2 and name != "training" else ("EIO",):
                _one(hook, name, commands[name], Path(folder) / f"{name}-{number}-{kind}", number, kind)


def _one(hook, name, command, output, number, kind):
    output.mkdir()
    case = {"case": f"{name}: {kind} at call {number}"}
    hook.fault_arm(str(output).encode(), number, ERRORS[kind])
    try:
        error = command(output)
    except Exception as problem:  # a defect; the test fails with it
        error = f"raised {type(problem).__name__}: {problem}"
    hook.fault_arm(b"", 0, 0)
    case |= {"error": error, "published": _published(output, name)}
    case["again"] = command(output)
    case["after"] = _published(output, name)
    print(json.dumps(case), flush=True)
    shutil.rmtree(output)


if __name__ == "__main__":
    _main(*sys.argv[1:])
