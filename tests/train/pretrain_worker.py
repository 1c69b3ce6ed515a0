"""One rank of tests/train/test_resume.py: a whole run, then one that begins at its checkpoint of step 3."""

import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")

from incr_ds.config.fields import load_settings  # noqa: E402
from incr_ds.config.training import RunSettings  # noqa: E402
from incr_ds.train.loop import pretrain  # noqa: E402


def main(run_file: str, output: str) -> None:
    torch.set_num_threads(1)
    whole = load_settings(Path(run_file), RunSettings, [f"output={output}/whole"])
    parts = load_settings(Path(run_file), RunSettings, [f"output={output}/parts"])
    pretrain(whole)
    if dist.get_rank() == 0:
        name = "checkpoints/step_00000003"
        shutil.copytree(Path(whole.output) / name, Path(parts.output) / name)
        shutil.copyfile(Path(whole.output) / "metrics.jsonl", Path(parts.output) / "metrics.jsonl")
    dist.barrier()
    pretrain(parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
