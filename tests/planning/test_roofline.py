"""Times by hand-worked figures."""

import pytest

from mplug_jax.planning.chips import CHIPS, Chip, PlanError, chip_named
from mplug_jax.planning.collectives import Collective
from mplug_jax.planning.roofline import BANDWIDTH, COMPUTE, NETWORK, roofline

GPU = Chip({"bfloat16": 100.0}, 1e9, 10.0, 8.0, 8, 1.0)
TPU = Chip({"bfloat16": 100.0}, 1e9, 10.0, 8.0, 16, None)


def times(chip, *collectives, devices=16):
    return roofline(chip, "bfloat16", 200.0, 40.0, collectives, devices)


def test_arithmetic_and_memory():
    line = times(GPU)
    assert line.compute == pytest.approx(2 / COMPUTE)
    assert line.memory == pytest.approx(4 / BANDWIDTH)
    assert line.step == max(line.compute, line.memory)
    assert line.serial == line.compute + line.memory


@pytest.mark.parametrize(
    ("group", "stride", "speed", "where"),
    [
        (8, 1, 8.0, "links"),  # within a node
        (16, 1, 8.0, "network"),  # eight rings, one an adapter: as fast as the links
        (4, 4, 2.0, "network"),  # two members in a node
        (2, 8, 1.0, "network"),  # one member in a node
    ],
)
def test_a_group_uses_the_links_or_the_adapters_of_its_nodes(group, stride, speed, where):
    each = Collective("gradients", "all-reduce", group, stride, 100.0)
    line = times(GPU, each, devices=group * stride)
    assert getattr(line, where) == pytest.approx(each.sent / (NETWORK * speed))
    assert line.links + line.network == getattr(line, where)


def test_what_binds():
    slow = Collective("gradients", "all-reduce", 2, 8, 1e6)
    assert times(GPU, slow).binds == "interconnect"
    assert times(GPU).binds == "HBM"
    assert roofline(GPU, "bfloat16", 1e6, 1.0, [], 1).binds == "compute"


def test_a_pod_has_an_end():
    assert times(TPU).step > 0
    with pytest.raises(PlanError, match="32 devices, and a pod of this chip 16"):
        times(TPU, devices=32)


def test_an_unknown_chip_is_told_the_known_ones():
    with pytest.raises(PlanError, match=r"--chip=h101 is unknown; choose a100-40.*h100.*v6e"):
        chip_named("h101")


def test_figures_of_the_table_agree_with_each_other():
    for name, chip in CHIPS.items():
        assert chip.peak["bfloat16"] >= chip.peak["float32"], name
        # An accelerator makes 100 to 600 bfloat16 FLOPs for each byte of HBM that it can read.
        assert 100 < chip.peak["bfloat16"] / chip.bandwidth < 600, name
        assert chip.link < chip.bandwidth, name
        assert chip.network is None or chip.network < chip.link, name
