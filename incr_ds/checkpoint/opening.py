"""Detects the format of a checkpoint folder, and opens its reader."""

from __future__ import annotations

from pathlib import Path

from incr_ds.arch.architecture import Architecture, saved_architecture
from incr_ds.checkpoint.deepspeed.reader import ZeroCheckpoint
from incr_ds.checkpoint.huggingface.reader import INDEX, SINGLE, HuggingFaceCheckpoint, weights_file
from incr_ds.checkpoint.megatron_core.folders import LATEST, has_rank_files, iteration_folder
from incr_ds.checkpoint.megatron_core.reader import MegatronCoreCheckpoint
from incr_ds.checkpoint.megatron_core.torch_reader import MegatronTorchCheckpoint
from incr_ds.checkpoint.naming import ADAPTER_CURE
from incr_ds.checkpoint.universal.reader import UniversalCheckpoint
from incr_ds.errors import CheckpointError

OpenedCheckpoint = (
    ZeroCheckpoint | UniversalCheckpoint | HuggingFaceCheckpoint | MegatronCoreCheckpoint | MegatronTorchCheckpoint
)
_LONGEST_TAG = 200  # bytes
ADAPTER = "adapter_config.json"  # transformers would load the adapter together with the model


def open_source(
    path: Path, tag: str | None = None, config: Path | None = None, *, trust: bool = False
) -> OpenedCheckpoint:
    """Open a checkpoint folder, DeepSpeed's, Megatron-core's or Hugging Face's.

    ``tag`` selects the DeepSpeed tag or the folder of Megatron's iteration; otherwise the file ``latest``,
    ``latest_universal`` or ``latest_checkpointed_iteration.txt`` does. The architecture comes from ``config``, otherwise from
    config.json in the tag's folder or in ``path``, and for Megatron otherwise from the run's arguments. Raises
    CheckpointError if the format is not known, and all errors of the reader.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: not a folder; expected a checkpoint of DeepSpeed or Megatron-core, or a Hugging Face folder."
        )
    if (path / ADAPTER).is_file():
        raise CheckpointError(f"{path / ADAPTER}: {ADAPTER_CURE}")
    # A folder of transformers' Trainer under DeepSpeed has both formats; only DeepSpeed's has the moments.
    if tag is None and weights_file(path) and not _tag_files(path):
        return HuggingFaceCheckpoint(path, _architecture(path, None, config), trust=trust)
    # Megatron-DeepSpeed writes Megatron's file, too, beside DeepSpeed's.
    if not _tag_files(path) and (iteration := iteration_folder(path, tag)) is not None:
        return (MegatronTorchCheckpoint if has_rank_files(iteration) else MegatronCoreCheckpoint)(iteration, config)
    tag = tag or _latest(path)
    if not (path / tag).is_dir():
        tags = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "none"
        raise CheckpointError(f"{path}: no folder for tag {tag!r}; existing folders: {tags}.")
    kind = UniversalCheckpoint if (path / tag / "zero").is_dir() else ZeroCheckpoint
    return kind(path, tag, _architecture(path, tag, config), trust=trust)


def _latest(path: Path) -> str:
    for latest in _tag_files(path):
        return _tag_in(latest)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    if _is_tag(path):
        raise CheckpointError(f"{path}: this is a tag folder; give its parent and --tag {path.name}.")
    if tags := sorted(entry.name for entry in path.iterdir() if _is_tag(entry)):
        raise CheckpointError(
            f"{path}: a DeepSpeed checkpoint without a file `latest`; name one of its tags with --tag: {', '.join(tags)}."
        )
    raise CheckpointError(
        f"{path}: neither a DeepSpeed checkpoint (a file `latest`), nor a Megatron-core one (a file `{LATEST}`), "
        f"nor a Hugging Face folder ({SINGLE} or {INDEX}); found {found}."
    )


def _is_tag(folder: Path) -> bool:
    return folder.is_dir() and any(any(folder.glob(pattern)) for pattern in ("*_states.pt", "zero/*/fp32.pt"))


def _tag_in(latest: Path) -> str:
    """Read the tag in a file. It must be the name of a folder beside the file."""
    with open(latest, "rb") as stream:
        content = stream.read(_LONGEST_TAG + 1)
    tag = content.decode("utf-8", errors="replace").strip()
    is_plain = tag.isprintable() and "\ufffd" not in tag and not {"", ".", ".."} & set(tag.split("/"))
    if len(content) > _LONGEST_TAG or not is_plain:
        raise CheckpointError(
            f"{latest}: expected the name of a folder beside it, found {tag[:40]!r}; the file is damaged. Name the tag with "
            "--tag."
        )
    return tag


def _tag_files(path: Path) -> list[Path]:
    return [path / name for name in ("latest", "latest_universal") if (path / name).is_file()]


def _architecture(path: Path, tag: str | None, config: Path | None) -> Architecture:
    inside = path / tag / "config.json" if tag else path / "config.json"
    chosen = config or (inside if inside.is_file() else path / "config.json")
    return saved_architecture(chosen)
