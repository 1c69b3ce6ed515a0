"""Child processes of test_hashing: two ranks that save, verify and fail together."""

import hashlib
import shutil
from pathlib import Path

import torch.distributed as dist

from incr_ds.checkpoint.publish import MANIFEST, read_manifest, seal
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import CheckpointError
from incr_ds.testing.pico import pico_architecture
from incr_ds.train import hashing
from incr_ds.train.checkpoints import KIND, TrainingState, newest_complete, save_checkpoint
from incr_ds.train.hashing import verify_together
from incr_ds.train.metrics import Position
from incr_ds.train.ranks import together

SIZES = {0: (70_000, 1_000), 1: (50_000, 30_000, 10)}  # bytes of the files that each rank writes


class FileEngine:
    """Writes this rank's files."""

    is_writing = False

    def finish_save(self):
        return {}

    def save(self, folder, tag, client_state):
        (folder / tag).mkdir(exist_ok=True)
        for number, size in enumerate(SIZES[dist.get_rank()]):
            name = f"rank{dist.get_rank()}_{number}.bin"
            (folder / tag / name).write_bytes(hashlib.shake_128(name.encode()).digest(size))


def together_and_alone(folder):
    """Everything that two ranks do, in one group. Returns what this rank found."""
    dist.init_process_group("gloo")
    try:
        run = _settings(folder)
        return {"saved": _save(run, folder), "damage": _damage(run, folder), "failures": _failures(run)}
    finally:
        dist.destroy_process_group()


def _settings(folder):
    content = {
        "output": str(folder),
        "precision": "fp32",
        "model": {"config": "config.json"},
        "layout": {"data_parallel": 2},
        "batch": {"sequence_length": 8, "micro_batch_size": 1, "global_batch_size": 2},
        "schedule": {"train_steps": 10, "learning_rate": 0.1},
        "data": {"train": [{"prefix": "a"}]},
        "checkpoint": {"interval": 1, "keep_last": 0},
    }
    return parse_settings(content, RunSettings, "test")


def _saved(run, step):
    state = TrainingState(
        position=Position(step=step), evaluated_step=0, data={"a": "f"}, settings=run.model_dump(mode="json")
    )
    return save_checkpoint(FileEngine(), run, pico_architecture(), state)


def _save(run, folder):
    """Save twice. Rank 0 writes the manifest of a copy alone. Returns both texts, and the names that this rank hashed."""
    hashed = _record("flushed_digest")
    saved, _ = _saved(run, 1), _saved(run, 2)
    names = [path.name for path in hashed[: len(hashed) // 2]]
    if dist.get_rank():
        return names, None, None
    alone = Path(folder) / "alone"
    shutil.copytree(saved, alone)
    (alone / MANIFEST).unlink()
    seal(alone, KIND, read_manifest(saved)["facts"])
    return names, (saved / MANIFEST).read_text(), (alone / MANIFEST).read_text()


def _damage(run, folder):
    """Change one byte of each file in turn, then of two files of different ranks. Returns the messages, and those said."""
    newest = Path(folder) / "checkpoints" / "step_00000002"
    names = list(read_manifest(newest)["files"])
    found = {name: _message(newest, [name]) for name in names}
    pair = [name for name in names if name.endswith(("rank0_0.bin", "rank1_0.bin"))]
    found["two"] = _message(newest, pair)
    said = []
    _flip(newest / pair[1])
    chosen = newest_complete(run, said.append)
    together()
    _flip(newest / pair[1])
    return found, said, str(chosen), str(newest_complete(run, said.append))


def _message(folder, names):
    for name in names:
        _flip(folder / name)
    try:
        verify_together(folder)
    except CheckpointError as error:
        return str(error)
    finally:
        together()  # no file is restored while another rank reads it
        for name in names:
            _flip(folder / name)
    return None


def _flip(path):
    """Change the last byte, or change it back."""
    if dist.get_rank() == 0:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    together()


def _failures(run):
    """Rank 1 cannot read while the ranks save, then while they verify. Returns the errors of this rank."""
    found = []
    for name, attempt in (("flushed_digest", _saved), ("hash_as_listed", lambda run, _: newest_complete(run, print))):
        whole = getattr(hashing, name)
        if dist.get_rank() == 1:
            setattr(hashing, name, _unreadable)
        try:
            attempt(run, 3)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        setattr(hashing, name, whole)
    together()  # rank 0 has removed what it did not publish
    return found, sorted(path.name for path in (Path(run.output) / "checkpoints").iterdir())


def _unreadable(path, *rest):
    raise OSError(5, "Input/output error", str(path))


def _record(name):
    """Keep the paths that a function of the module is called with."""
    whole, paths = getattr(hashing, name), []

    def recording(path, *rest):
        paths.append(path)
        return whole(path, *rest)

    setattr(hashing, name, recording)
    return paths
