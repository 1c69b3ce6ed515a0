"""Shows rows besides metrics.jsonl, which is the record: in TensorBoard, and in Weights & Biases if the run file asks for it."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.config.training import WandbSettings
from incr_ds.errors import ConfigError

WANDB = "wandb"  # folder in the run's output
_ID = re.compile(r"[0-9a-f]{16}")


def named_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a row by KIND/NAME, without those that are not known. Named held-out sets give KIND/SET/NAME."""
    kind = content["kind"]
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= {f"{kind}/{own}/{key}": one for own, values in value.items() for key, one in values.items()}
        elif name not in ("kind", "step"):
            found[f"{kind}/{name}"] = value
    return {name: value for name, value in found.items() if value is not None}


class Board(Protocol):
    """Shows the rows of a run."""

    def write(self, content: Mapping[str, Any]) -> None:
        """Show one row of metrics.jsonl."""
        ...

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier ``step``."""
        ...

    def close(self, *, failed: bool) -> None:
        """Finish. ``failed`` says whether the run ended with an error."""
        ...


class TensorBoard:
    """TensorBoard's event files in ``folder``. What they have past ``resumed_step`` is hidden."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        self._folder = str(folder)
        self._open(resumed_step)

    def _open(self, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(self._folder, purge_step=None if step is None else step + 1)

    def write(self, content: Mapping[str, Any]) -> None:
        """Add a scalar for every number, and a text for every text."""
        for name, value in named_values(content).items():
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(name, value, content["step"])

    def rewind(self, step: int) -> None:
        """Hide what was shown after ``step``."""
        self._writer.close()
        self._open(step)

    def close(self, *, failed: bool) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbBoard:
    """A run of Weights & Biases. Only the rows and ``config`` (the run file's content) go there, and what wandb adds: the host's
    name, the platform and versions. No code, no git state, no console.

    In mode offline nothing is sent. A run that is resumed goes on with the id that it has in ``output``. If a row cannot be
    passed on, that is said once, and training goes on without the board.
    """

    def __init__(
        self,
        output: Path,
        settings: WandbSettings,
        config: Mapping[str, Any],
        *,
        resumes: bool,
        say: Callable[[str], None],
    ) -> None:
        """Raises ConfigError if the run cannot be opened, for instance because nobody is logged in."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own reports of crashes
        import wandb

        self._say = say
        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        (output / WANDB).mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or output.name,
                mode=settings.mode,
                id=_run_id(output / WANDB / "run_id", resumes=resumes),
                resume="allow" if settings.mode == "online" else None,
                dir=str(output),
                config=dict(config),
                settings=quiet,
            )
        except Exception as error:  # wandb has many kinds, of the network, of the login, and of its own process
            raise ConfigError(
                f"wandb: the run could not be opened ({type(error).__name__}: {error}). Log in with `wandb login`, set "
                "wandb.mode: offline, or remove the section wandb."
            ) from error
        # Steps repeat where a growth or an evaluation is logged, and after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, content: Mapping[str, Any]) -> None:
        """Log every number and text of a row as KIND/NAME, over ``step``."""
        if self._run is None:
            return
        try:
            self._run.log({**named_values(content), "step": content["step"]})
        except Exception as error:
            self._run = None
            self._say(
                f"wandb: no further row is passed on ({type(error).__name__}: {error}); metrics.jsonl has all of them"
            )

    def rewind(self, step: int) -> None:
        """Nothing: what was logged stays, and the row of the roll-back says from where the run goes on."""

    def close(self, *, failed: bool) -> None:
        """Pass on what is left, and end the run."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            self._say(f"wandb: could not be finished ({type(error).__name__}: {error}); metrics.jsonl has every row")


def _run_id(path: Path, *, resumes: bool) -> str:
    """The id in ``path`` if the run resumes and has one, otherwise a new one."""
    if resumes and path.is_file() and _ID.fullmatch(known := path.read_text("utf-8", errors="replace").strip()):
        return known
    made = secrets.token_hex(8)
    write_atomically(path, made + "\n")
    return made
