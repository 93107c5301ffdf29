"""How long a step takes at least: arithmetic, memory and network, each at what it can sustain.

The three overlap in a good program, so the step takes as long as the slowest of them; without any
overlap it takes their sum. Both are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from mplug_jax.planning.chips import Chip, PlanError
from mplug_jax.planning.collectives import Collective

# What large matrix products, streams of memory and long messages reach of the published peaks.
# Published utilisation of transformers of 0.3 to 22 billion parameters is 33 to 56 %.
COMPUTE = 0.5
BANDWIDTH = 0.8
NETWORK = 0.8


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step on each device.

    Attributes:
      compute, memory: arithmetic and HBM.
      links: exchanges inside of a node or pod; network: those that cross nodes.
    """

    compute: float
    memory: float
    links: float
    network: float

    @property
    def step(self) -> float:
        """All overlapped."""
        return max(self.compute, self.memory, self.links + self.network)

    @property
    def serial(self) -> float:
        """Nothing overlapped."""
        return self.compute + self.memory + self.links + self.network

    @property
    def binds(self) -> str:
        """What the step waits for."""
        times = {
            "compute": self.compute,
            "HBM": self.memory,
            "interconnect": self.links + self.network,
        }
        return max(times, key=times.__getitem__)


def roofline(
    chip: Chip,
    dtype: str,
    flops: float,
    traffic: float,
    collectives: Iterable[Collective],
    devices: int,
) -> Roofline:
    """The time of a step.

    A group of devices inside of a node uses its links. One that spans nodes is a ring over the
    network, whose members in a node share the adapters of all of them: ``members x network``, and
    at most the links.

    Args:
      flops, traffic: of one device, recomputation included.

    Raises:
      PlanError: more devices than a pod has, where no network between pods is known.
    """
    if devices > chip.node and chip.network is None:
        raise PlanError(
            f"--mesh has {devices} devices, and a pod of this chip {chip.node}: a network between "
            "pods is not in the table of mplug_jax/planning/chips.py."
        )
    links = network = 0.0
    for each in collectives:
        span = each.group * each.stride
        if span <= chip.node:
            links += each.sent / (NETWORK * chip.link)
        else:
            members = max(chip.node // each.stride, 1)
            speed = min(members * chip.network, chip.link)
            network += each.sent / (NETWORK * speed)
    return Roofline(
        flops / (COMPUTE * chip.peak[dtype]),
        traffic / (BANDWIDTH * chip.bandwidth),
        links,
        network,
    )
