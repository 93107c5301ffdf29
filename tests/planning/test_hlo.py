"""Collectives read from a program's text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mplug_jax.planning.hlo import collectives_of

TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %g = bf16[16,2]{1,0} all-gather(%y), replica_groups=[4,2]<=[8], dimensions={0}
  %s = (f32[2]{0}, f32[6]{0}) reduce-scatter(%y, %z), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %w = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body, backend_config=TURNS
  %c = f32[3]{0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
}
""".replace("TURNS", '{"known_trip_count":{"n":"5"}}')


def test_kinds_groups_sizes_and_turns():
    found = {each.kind: each for each in collectives_of(TEXT, 8)}
    assert len(found) == len(collectives_of(TEXT, 8)) == 4
    reduced, gathered = found["all-reduce"], found["all-gather"]
    assert (reduced.group, reduced.size, reduced.times) == (4, 128, 5)
    assert reduced.sent == 2 * 3 / 4 * 128 * 5
    assert (gathered.group, gathered.size, gathered.sent) == (2, 64, 32)
    # Of a reduce-scatter the text shows the shards.
    assert (found["reduce-scatter"].group, found["reduce-scatter"].size) == (4, 4 * 32)
    assert found["collective-permute"].sent == 12


def test_a_compiled_sum_over_eight_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    compiled = jax.jit(lambda x: x.T @ x, in_shardings=rows, out_shardings=whole).lower(x).compile()
    found = collectives_of(compiled.as_text(), 8)
    assert [(c.kind, c.group, c.times) for c in found] == [("all-reduce", 8, 1)]
    assert found[0].sent == pytest.approx(2 * 7 / 8 * 32 * 32 * 4)
