"""Validates a file's content against types when the file is opened. Errors name the first wrong entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from incr_ds.errors import CheckpointError

Content = TypeVar("Content")
_TENSORS = TypeAdapter(dict[str, torch.Tensor], config=ConfigDict(arbitrary_types_allowed=True))


def tensors(content: Any, path: Path, writer: str = "DeepSpeed") -> dict[str, torch.Tensor]:
    """Validate a mapping of tensors by name, as ``writer`` saves them."""
    return checked(_TENSORS, content, path, writer=writer)


def checked(
    adapter: TypeAdapter[Content], content: Any, path: Path, at: str = "", writer: str = "DeepSpeed"
) -> Content:
    """Validate ``content``, which is at ``at`` in the file, against ``adapter``.

    Raises CheckpointError that names the first entry that is not what ``writer`` writes there.
    """
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join([at] * bool(at) + [str(key) for key in first["loc"]])
        found = type(first["input"]).__name__
        raise CheckpointError(
            f"{path}: {where or 'its content'}: {first['msg']}, found {found}: not what {writer} writes there. Copy the file "
            "again, or use another tag."
        ) from None
