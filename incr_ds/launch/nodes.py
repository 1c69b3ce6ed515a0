"""How many nodes, and GPUs on each, the ranks of a layout fill; the deepspeed launcher's hostfile. Pure arithmetic and text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError

USUAL_GPUS = 8  # on a node
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Nodes:
    """``count`` nodes, each with ``gpus`` GPUs and as many ranks."""

    count: int
    gpus: int

    def __str__(self) -> str:
        """For instance: 2 nodes x 8 GPUs = 16 ranks."""
        return (
            f"{_number(self.count, 'node')} x {_number(self.gpus, 'GPU')} = {_number(self.count * self.gpus, 'rank')}"
        )


def divide(layout: ParallelLayout, count: int | None = None, gpus: int | None = None) -> Nodes:
    """The nodes that the ranks of ``layout`` fill exactly. What is None follows from the other and the number of ranks.

    If both are None, a node has 8 GPUs, or as many as there are ranks. Raises ConfigError that names the nearest numbers
    which divide the ranks.
    """
    ranks = layout.world_size
    if count is not None and gpus is None:
        if ranks % count:
            raise ConfigError(
                f"--nodes {count}: the layout {layout} has {ranks} ranks, which {count} nodes cannot share evenly; nearest that "
                f"can: --nodes {_either(nearest_divisors(ranks, count))}."
            )
        return Nodes(count, ranks // count)
    per_node = min(USUAL_GPUS, ranks) if gpus is None else gpus
    if ranks % per_node:
        raise ConfigError(_uneven(layout, per_node))
    if count is not None and count * per_node != ranks:
        raise ConfigError(
            f"--nodes {count} with --gpus-per-node {per_node}: {count * per_node} GPUs, but the layout {layout} has {ranks} "
            f"ranks, one per GPU; expected --nodes {ranks // per_node}, or leave it out."
        )
    return Nodes(ranks // per_node, per_node)


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of ``number`` that are closest to ``wanted``: one, or two at the same distance."""
    divisors = [one for one in range(1, number + 1) if number % one == 0]
    distance = min(abs(one - wanted) for one in divisors)
    return [one for one in divisors if abs(one - wanted) == distance]


def hostfile(hosts: Sequence[str], nodes: Nodes) -> str:
    """The lines of a hostfile: each host with its number of ranks. Raises ConfigError unless there is one host per node."""
    if wrong := [host for host in hosts if not _HOST.fullmatch(host)]:
        raise ConfigError(f"--hosts {wrong[0]!r}: expected host names, separated by commas, like node1,node2.")
    if twice := [host for number, host in enumerate(hosts) if host in hosts[:number]]:
        raise ConfigError(f"--hosts {twice[0]}: named twice; each host stands once, whatever its number of GPUs.")
    if len(hosts) != nodes.count:
        raise ConfigError(
            f"--hosts: {_number(len(hosts), 'host')}, but the run needs {nodes}; name {_number(nodes.count, 'host')}, or state "
            "--gpus-per-node."
        )
    return "".join(f"{host} slots={nodes.gpus}\n" for host in hosts)


def _uneven(layout: ParallelLayout, gpus: int) -> str:
    model = layout.tensor_parallel * layout.pipeline_parallel
    unit = gpus // math.gcd(gpus, model)  # data_parallel has to be a multiple of it
    below = layout.data_parallel // unit * unit
    degrees = [one for one in (below, below + unit) if one]
    return (
        f"--gpus-per-node {gpus}: the layout {layout} has {layout.world_size} ranks, which do not fill nodes of {gpus} GPUs; "
        f"nearest that do: --gpus-per-node {_either(nearest_divisors(layout.world_size, gpus))}, or "
        f"layout.data_parallel {_either(degrees)} in the run file."
    )


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _number(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
