"""Figures of accelerators, as their vendors publish them: the one table that a forecast trusts.

Sources, by the names of the documents:

- NVIDIA: the data sheets "A100 Tensor Core GPU" (SXM4, 40 and 80 GB), "H100 Tensor Core GPU" (SXM5)
  and "H200 Tensor Core GPU" (SXM). Peaks are those without sparsity. NVLink is
  published as the sum of both directions; half of it counts here. Between nodes: one adapter a GPU,
  200 Gbit/s (DGX A100) and 400 Gbit/s (DGX H100 and H200), from the "DGX" data sheets.
- Google: the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation.
  Published inter-chip bandwidth is that of all links of a chip; the pages of v5e and v6e give the
  sum of both directions, of which half counts here, in agreement with the 1,600 Gbit/s that the
  page of v5e used to state.
"""

from __future__ import annotations

import dataclasses


class PlanError(ValueError):
    """A forecast that was asked for and cannot be made; the message says what would do."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      peak: FLOP/s of matrix products, by ``config.model.dtype``. float32 is what JAX does by
        default: TF32 on a GPU, bfloat16 passes on a TPU.
      memory: bytes of HBM; bandwidth: bytes/s of it.
      link: bytes/s in one direction between the chips of a node (NVLink) or a pod (ICI).
      node: chips that the links join.
      network: bytes/s in one direction of a chip between nodes, None where none is published.
    """

    peak: dict[str, float]
    memory: float
    bandwidth: float
    link: float
    node: int
    network: float | None


def _gpu(
    bf16: float, tf32: float, memory: float, bandwidth: float, link: float, net: float
) -> Chip:
    return Chip({"bfloat16": bf16, "float32": tf32}, memory, bandwidth, link, 8, net)


def _tpu(bf16: float, memory: float, bandwidth: float, link: float, pod: int) -> Chip:
    return Chip({"bfloat16": bf16, "float32": bf16}, memory, bandwidth, link, pod, None)


CHIPS: dict[str, Chip] = {
    "a100-40": _gpu(312e12, 156e12, 40e9, 1.555e12, 300e9, 25e9),
    "a100-80": _gpu(312e12, 156e12, 80e9, 2.039e12, 300e9, 25e9),
    "h100": _gpu(989e12, 494e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": _gpu(989e12, 494e12, 141e9, 4.8e12, 450e9, 50e9),
    "v4": _tpu(275e12, 32e9, 1.2e12, 300e9, 4096),
    "v5e": _tpu(197e12, 16e9, 0.819e12, 200e9, 256),
    "v5p": _tpu(459e12, 95e9, 2.765e12, 600e9, 8960),
    "v6e": _tpu(918e12, 32e9, 1.638e12, 400e9, 256),
}


def chip_named(name: str) -> Chip:
    """The figures of a chip.

    Raises:
      PlanError: a name that the table lacks.
    """
    if name not in CHIPS:
        raise PlanError(f"--chip={name} is unknown; choose {', '.join(CHIPS)}.")
    return CHIPS[name]
