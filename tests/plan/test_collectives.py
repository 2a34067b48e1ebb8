"""jaxtrain.plan.collectives: collectives of compiled programs, against counts by hand."""

from __future__ import annotations

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.plan.collectives import Collective, collectives

ORDERS = {
    "in order": np.arange(8),
    "rolled": np.roll(np.arange(8), 3),
    "transposed": np.arange(8).reshape(4, 2).T.ravel(),
}
MESHES = {
    "2x4": {"data": 2, "model": 4},
    "4x2": {"data": 4, "model": 2},
    "model first": {"model": 2, "data": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "model": 2},
    "one of size 1": {"data": 2, "fsdp": 1, "model": 4},
}
FLAT = AbstractMesh((2, 4), ("data", "model"))
CUBE = AbstractMesh((2, 2, 2), ("a", "b", "c"))


def make_mesh(shape: dict[str, int], order: str = "in order") -> Mesh:
    devices = np.array(jax.devices())[ORDERS[order]]
    return Mesh(devices.reshape(tuple(shape.values())), tuple(shape))


def array(mesh: Mesh, shape: tuple[int, ...], *spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def text(fn: Any, *args: Any) -> str:
    return jax.jit(fn).lower(*args).compile().as_text()


def bytes_moved(fn: Any, mesh: Mesh, *args: Any) -> dict[tuple[str, tuple[str, ...]], int]:
    """Bytes by kind and axes; how many arrays XLA combines into one collective is not compared."""
    return {(one.kind, one.axes): one.bytes for one in collectives(text(fn, *args), mesh)}


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """The loss of a network 16 → 32 → 8."""
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


@pytest.mark.full("[2x4-in order]", "[model first-rolled]")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MESHES)
def test_data_parallel_reduces_the_gradients_over_data(name: str, order: str) -> None:
    mesh = make_mesh(MESHES[name], order)
    params = {"in": array(mesh, (16, 32)), "out": array(mesh, (32, 8))}
    batch = array(mesh, (8, 16), "data"), array(mesh, (8, 8), "data")
    gradients = 4 * (16 * 32 + 32 * 8)
    assert bytes_moved(jax.value_and_grad(loss), mesh, params, *batch) == {
        ("all-reduce", ("data",)): gradients + 4  # and the loss
    }


def test_batch_over_two_axes_reduces_over_both() -> None:
    mesh = make_mesh(MESHES["2x2x2"], "transposed")
    params = {"in": array(mesh, (16, 32)), "out": array(mesh, (32, 8))}
    both = ("data", "model")
    batch = array(mesh, (8, 16), both), array(mesh, (8, 8), both)
    found = bytes_moved(jax.value_and_grad(loss), mesh, params, *batch)
    assert found == {("all-reduce", both): 4 * (16 * 32 + 32 * 8) + 4}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 4}, {"fsdp": 4, "data": 2}, MESHES["2x2x2"]])
def test_fsdp_gathers_the_parameters_over_fsdp(shape: dict[str, int], order: str) -> None:
    mesh = make_mesh(shape, order)
    replicated = NamedSharding(mesh, PartitionSpec())

    def gathered_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return loss(jax.lax.with_sharding_constraint(params, replicated), x, y)

    params = {"in": array(mesh, (16, 32), "fsdp"), "out": array(mesh, (32, 8), "fsdp")}
    split = ("data", "fsdp")
    batch = array(mesh, (8, 16), split), array(mesh, (8, 8), split)
    assert bytes_moved(gathered_loss, mesh, params, *batch) == {
        ("all-gather", ("fsdp",)): 4 * (16 * 32 + 32 * 8),
        ("all-reduce", tuple(name for name in shape if name in split)): 4,
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MESHES)
def test_tensor_parallel_reduces_the_activations_over_model(name: str, order: str) -> None:
    mesh = make_mesh(MESHES[name], order)
    params = {"in": array(mesh, (16, 32), None, "model"), "out": array(mesh, (32, 8), "model")}
    batch = array(mesh, (8, 16), "data"), array(mesh, (8, 8), "data")
    assert bytes_moved(loss, mesh, params, *batch) == {
        ("all-reduce", ("model",)): 4 * 8 * 8 // MESHES[name]["data"],
        ("all-reduce", ("data",)): 4,
    }


SUBSETS = [axes for n in (1, 2, 3) for axes in itertools.combinations(("a", "b", "c"), n)]


@pytest.mark.full("[a-in order]", "[b-transposed]", "[ac-rolled]", "[abc-in order]")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", SUBSETS, ids="".join)
def test_each_kind_over_each_set_of_axes(axes: tuple[str, ...], order: str) -> None:
    mesh, n = make_mesh({"a": 2, "b": 2, "c": 2}, order), 2 ** len(axes)

    def step(x: jax.Array) -> jax.Array:  # float32 [8, 16]: 512 bytes
        x = jnp.sin(jax.lax.psum(x, axes))
        x = jnp.sin(jax.lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)]))
        x = jnp.sin(jax.lax.all_to_all(x, axes, 0, 1, tiled=True))
        x = jnp.sin(jax.lax.psum_scatter(x.reshape(8, 16), axes, tiled=True))
        return jax.lax.all_gather(jnp.sin(x), axes, tiled=True)

    replicated = PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    expected = tuple(Collective(kind, axes, 512, 1) for kind in kinds)
    assert collectives(text(mapped, array(mesh, (8, 16))), mesh) == expected


def hlo_text(mesh: Mesh, fn: Any) -> str:
    """Compile ``fn`` on a float32 [8, 16] per device, 512 bytes; returns the text."""
    replicated = PartitionSpec()
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)
    return text(mapped, array(mesh, (8, 16)))


def test_collectives_within_one_device_are_left_out() -> None:
    mesh = make_mesh({"data": 8, "model": 1})
    assert collectives(hlo_text(mesh, lambda x: jax.lax.psum(x, "model")), mesh) == ()
    stay = hlo_text(mesh, lambda x: jax.lax.ppermute(x, "data", [(i, i) for i in range(8)]))
    assert collectives(stay, mesh) == ()
    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert collectives(hlo_text(one, lambda x: jax.lax.psum(x, "data")), one) == ()


def test_partial_permutation_of_an_axis() -> None:
    mesh = make_mesh(MESHES["2x4"])
    found = collectives(hlo_text(mesh, lambda x: jax.lax.ppermute(x, "model", [(0, 3)])), mesh)
    assert found == (Collective("collective-permute", ("model",), 512, 1),)


def summed(axis: str) -> Any:
    return lambda x: jnp.sin(jax.lax.psum(x, axis))


def test_scan_multiplies_by_its_length() -> None:
    mesh = make_mesh(MESHES["2x4"])

    def step(x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda c, _: (summed("model")(c), None), x, None, length=5)
        return summed("data")(summed("model")(x))

    hlo = hlo_text(mesh, step)
    expected = (
        Collective("all-reduce", ("model",), 6 * 512, 6),
        Collective("all-reduce", ("data",), 512, 1),
    )
    assert collectives(hlo, mesh) == expected
    unknown, n = re.subn(r',"known_trip_count":{"n":"5"}', "", hlo)
    assert n == 1 and collectives(unknown, mesh) == expected  # the 5 of the condition


def test_nested_loops_multiply() -> None:
    mesh = make_mesh(MESHES["2x4"])

    def step(x: jax.Array) -> jax.Array:
        inner = lambda x: jax.lax.scan(lambda c, _: (summed("model")(c), None), x, None, length=3)[0]  # noqa: E731
        return jax.lax.fori_loop(2, 9, lambda _, x: summed("data")(inner(x)), x)

    assert collectives(hlo_text(mesh, step), mesh) == (
        Collective("all-reduce", ("model",), 21 * 512, 21),
        Collective("all-reduce", ("data",), 7 * 512, 7),
    )


def test_loop_of_unknown_length_counts_as_one_iteration() -> None:
    mesh = make_mesh(MESHES["2x4"])

    def step(x: jax.Array) -> jax.Array:
        small = lambda x: jax.lax.psum(x.sum(), "model") < 100  # noqa: E731
        return jax.lax.while_loop(small, summed("data"), x)

    assert collectives(hlo_text(mesh, step), mesh) == (
        Collective("all-reduce", ("data",), 512, 1),
        Collective("all-reduce", ("model",), 4, 1),
    )


def test_conditional_counts_its_larger_branch() -> None:
    mesh = make_mesh(MESHES["2x4"])
    large = lambda x: jax.lax.all_gather(x, "data").sum(0) + 1  # noqa: E731

    for branches in ((large, summed("model")), (summed("model"), large)):
        hlo = hlo_text(mesh, lambda x, pair=branches: jax.lax.cond(x[0, 0] > 0, *pair, x))
        assert "conditional(" in hlo
        assert collectives(hlo, mesh) == (Collective("all-gather", ("data",), 2 * 512, 1),)


def program(*lines: str, before: str = "") -> str:
    return "\n".join([before, "ENTRY %main (p: f32[8]) -> f32[8] {", *(f"  {x}" for x in lines), "}"])


OVER_MODEL = "replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"
GROUPS = [
    (FLAT, "{{0,1,2,3},{4,5,6,7}}", ("model",), 4),
    (FLAT, "{{4,0},{1,5},{6,2},{3,7}}", ("data",), 2),
    (FLAT, "{}", ("data", "model"), 8),
    (FLAT, "{{}}", ("data", "model"), 8),
    (FLAT, "[2,4]<=[8]", ("model",), 4),
    (FLAT, "[4,2]<=[2,4]T(1,0)", ("data",), 2),
    (FLAT, "[4,2]<=[8]", ("model",), 2),  # halves of the axis
    (FLAT, "[1,8]<=[8]", ("data", "model"), 8),
    (FLAT, "mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}", ("data",), 2),
    (FLAT, "mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_2','axis_1'}", ("model",), 4),
    (FLAT, "mesh['u'=4,'v'=2], device_ids=([2,4]T(1,0)) {'u'}", ("model",), 4),
    (FLAT, "mesh['u'=4,'v'=2], device_ids=([2,4]T(1,0)) {'v'}", ("data",), 2),
    (FLAT, "mesh['u'=4,'v'=2] {'v','u'}", ("data", "model"), 8),
    (FLAT, "mesh[u=2,v=4] {v}", ("model",), 4),
    (FLAT, "mesh['x'=8] {'x':(1)2}", ("data",), 2),
    (CUBE, "{{0,1},{2,3},{4,5},{6,7}}", ("c",), 2),
    (CUBE, "{{0,2},{1,3},{4,6},{5,7}}", ("b",), 2),
    (CUBE, "{{0,4},{1,5},{2,6},{3,7}}", ("a",), 2),
    (CUBE, "{{0,5},{1,4},{2,7},{3,6}}", ("a", "c"), 2),  # no set of axes: the smallest that holds them
    (CUBE, "{{0,1},{2,4},{3,5},{6,7}}", ("a", "b", "c"), 2),
    (CUBE, "[2,4]<=[2,2,2]T(1,0,2)", ("a", "c"), 4),
    (CUBE, "[2,4]<=[2,2,2]T(2,1,0)", ("a", "b"), 4),
    (CUBE, "[2,4]<=[4,2]T(1,0)", ("a", "b"), 4),
    (CUBE, "[2,4]<=[2,2,2]T(1,2,0)", ("a", "c"), 4),  # {0,4,1,5}, {2,6,3,7}
    (CUBE, "mesh['x'=8] {'x':(2)2}", ("b",), 2),
    (CUBE, "mesh['x'=8] {'x':(1)4}", ("a", "b"), 4),
    (CUBE, "mesh['x'=8] {'x':(1)2,'x':(4)2}", ("a", "c"), 4),
    (CUBE, "mesh['u'=4,'v'=2], device_ids=(0,2,1,3,4,6,5,7) {'v'}", ("b",), 2),
]


@pytest.mark.parametrize(("mesh", "groups", "axes", "size"), GROUPS, ids=[row[1] for row in GROUPS])
def test_device_groups_in_every_notation(mesh: Any, groups: str, axes: tuple[str, ...], size: int) -> None:
    rest = (
        f"channel_id=3, replica_groups={groups}, use_global_device_ids=true, dimensions={{0}}, to_apply=%add"
    )
    hlo = program(f"ROOT %r = f32[3]{{0}} reduce-scatter(%p), {rest}")
    assert collectives(hlo, mesh) == (Collective("reduce-scatter", axes, 12 * size, 1),)
    last = f"ROOT %r = f32[3]{{0}} all-reduce(%p), replica_groups={groups}"
    assert collectives(program(last), mesh) == (Collective("all-reduce", axes, 12, 1),)


@pytest.mark.parametrize("groups", ["[8,1]<=[8]", "{{0},{1},{2},{3},{4},{5},{6},{7}}", "mesh['x'=8] {}"])
def test_groups_of_one_device_move_nothing(groups: str) -> None:
    assert (
        collectives(program(f"%r = f32[3] all-reduce(%p), replica_groups={groups}, to_apply=%a"), FLAT) == ()
    )


def test_groups_of_unequal_sizes() -> None:
    hlo = program("%r = f32[3] all-reduce(%p), replica_groups={{6,7,4},{5},{0,1},{2,3}}, to_apply=%add")
    assert collectives(hlo, CUBE) == (Collective("all-reduce", ("b", "c"), 12, 1),)


def test_replica_ids_and_partition_ids() -> None:
    """Without use_global_device_ids a reduction over replica 0 is one over all of its partitions."""
    every = ("data", "model")
    hlo = program(
        "%a = f32[1] all-reduce(%p), channel_id=1, replica_groups={{0}}, to_apply=%add",
        "%b = f32[2] reduce-scatter(%p), channel_id=2, replica_groups={{0}}, dimensions={0}, to_apply=%add",
        "%c = f32[3] all-gather(%p), channel_id=3, replica_groups={{0}}, dimensions={0}",
        "%d = f32[4] all-to-all(%p), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
        "%e = f32[5] collective-permute(%p), channel_id=5, source_target_pairs={{0,4},{4,0}}",
    )
    assert {(one.kind, one.axes, one.bytes) for one in collectives(hlo, FLAT)} == {
        ("all-reduce", every, 4),
        ("reduce-scatter", every, 8 * 8),
        ("all-gather", every, 12),
        ("all-to-all", ("model",), 16),
        ("collective-permute", ("data",), 20),
    }


ASYNC = {
    "all-reduce": (
        "%s = f32[16,32]{1,0} all-reduce-start(%p), GROUPS, to_apply=%add",
        "%d = f32[16,32]{1,0} all-reduce-done(%s)",
        2048,
    ),
    "all-reduce of many": (
        "%s = (f32[16,32]{1,0}, f32[], /*index=2*/bf16[8]{0}) all-reduce-start(%p, %q, %r), GROUPS",
        "%d = (f32[16,32]{1,0}, f32[], bf16[8]{0}) all-reduce-done(%s)",
        2048 + 4 + 16,
    ),
    "all-reduce with its operands": (
        "%s = ((f32[16]{0}, f32[2]{0}), (f32[16]{0}, f32[2]{0}), s32[]) all-reduce-start(%p, %q), GROUPS",
        "%d = (f32[16]{0}, f32[2]{0}) all-reduce-done(%s)",
        64 + 8,
    ),
    "all-gather": (
        "%s = (f32[4,3]{1,0}, f32[16,3]{1,0}) all-gather-start(%p), GROUPS, dimensions={0}",
        "%d = f32[16,3]{1,0} all-gather-done(%s)",
        192,
    ),
    "all-gather of many": (
        "%s = ((f32[4]{0}, bf16[2,8]{1,0:T(8,128)(2,1)S(1)}), (f32[16]{0}, bf16[8,8]{1,0:T(8,128)(2,1)})) "
        "all-gather-start(%p, %q), GROUPS, dimensions={0}",
        "%d = (f32[16]{0}, bf16[8,8]{1,0:T(8,128)(2,1)}) all-gather-done(%s)",
        64 + 128,
    ),
    "reduce-scatter": (
        "%s = ((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%p), GROUPS, dimensions={0}, to_apply=%add",
        "%d = f32[4]{0} reduce-scatter-done(%s)",
        64,
    ),
    "all-to-all": (
        "%s = ((f32[4]{0}, f32[4]{0}), (f32[4]{0}, f32[4]{0})) all-to-all-start(%p, %q), GROUPS",
        "%d = (f32[4]{0}, f32[4]{0}) all-to-all-done(%s)",
        32,
    ),
    "ragged-all-to-all": (
        "%s = ((f32[4]{0}, f32[9]{0}, s32[4]), f32[9]{0}) ragged-all-to-all-start(%p, %q, %r), GROUPS",
        "%d = f32[9]{0} ragged-all-to-all-done(%s)",
        36,
    ),
    "collective-broadcast": (
        "%s = ((f32[4]{0}), f32[4]{0}, u32[]) collective-broadcast-start(%p), GROUPS",
        "%d = f32[4]{0} collective-broadcast-done(%s)",
        16,
    ),
    "collective-permute": (
        "%s = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), "
        "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
        "%d = f32[8]{0} collective-permute-done(%s)",
        32,
    ),
}


@pytest.mark.parametrize("name", ASYNC)
def test_asynchronous_collectives_count_once_by_their_result(name: str) -> None:
    start, done, size = ASYNC[name]
    start = start.replace("GROUPS", f"channel_id=1, {OVER_MODEL}")
    end = ', metadata={op_name="jit(step)/psum"}'
    hlo = program(
        start + end + ', backend_config={"collective_backend_config":{"is_sync":false}}', done + end
    )
    assert collectives(hlo, FLAT) == (Collective(name.partition(" ")[0], ("model",), size, 1),)


def test_computations_count_once_per_call() -> None:
    before = f"""
%async_computation (q: f32[16]) -> f32[4] {{
  %q = f32[16]{{0}} parameter(0)
  ROOT %rs = f32[4]{{0}} reduce-scatter(%q), channel_id=1, {OVER_MODEL}, dimensions={{0}}, to_apply=%add
}}, execution_thread="explicit"

%inner (r: f32[2]) -> f32[2] {{
  ROOT %ar = f32[2]{{0}} all-reduce(%r), {OVER_MODEL}, to_apply=%add
}}

%outer (r: f32[2]) -> f32[2] {{
  %f = f32[2]{{0}} fusion(%r), kind=kCustom, calls=%inner
  ROOT %g = f32[2]{{0}} call(%f), to_apply=%inner
}}

%never_called (r: f32[2]) -> f32[2] {{
  ROOT %ag = f32[2]{{0}} all-gather(%r), {OVER_MODEL}
}}
"""
    hlo = program(
        "%s = ((f32[16]{0}), f32[4]{0}) async-start(%p), calls=%async_computation",
        "%u = ((f32[16]{0}), f32[4]{0}) async-update(%s), calls=%async_computation",
        "%d = f32[4]{0} async-done(%u), calls=%async_computation",
        "%a = f32[2]{0} call(%x), to_apply=%outer",
        '%b = (f32[2]{0}) custom-call(%x), custom_call_target="x", called_computations={%outer, %inner}',
        before=before,
    )
    assert collectives(hlo, FLAT) == (
        Collective("reduce-scatter", ("model",), 64, 1),
        Collective("all-reduce", ("model",), 5 * 8, 5),
    )


LOOP = f"""
%body (r: (s32[], f32[2])) -> (s32[], f32[2]) {{
  %ar = f32[2]{{0}} all-reduce(%x), {OVER_MODEL}, to_apply=%add
}}

%less (a: s32[], b: s32[]) -> pred[] {{
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}}

%fused (r: (s32[], f32[2])) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(6)
  ROOT %c = pred[] fusion(%i, %n), kind=kLoop, calls=%less
}}

%plain (r: (s32[], f32[2])) -> pred[] {{
  %one = f32[] constant(1)
  %n = u32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%either (r: (s32[], f32[2])) -> pred[] {{
  %n = s32[] constant(8)
  %enough = pred[] compare(%x, %y), direction=LT
  %lt = pred[] compare(%i, %n), direction=LT
  ROOT %and = pred[] and(%enough, %lt)
}}

%other (r: (s32[], f32[2])) -> pred[] {{
  %n = s32[] constant(9)
  ROOT %ne = pred[] compare(%i, %n), direction=NE
}}

%variable (r: (s32[], f32[2])) -> pred[] {{
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}
"""
LOOPS = [
    ("condition=%fused, body=%body", 6),
    ("condition=%plain, body=%body", 7),
    ("condition=%either, body=%body", 1),  # 8 at most
    ("condition=%other, body=%body", 1),
    ("condition=%variable, body=%body", 1),
    ('condition=%plain, body=%body, backend_config={"known_trip_count":{"n":"3"}}', 3),
    ('condition=%other, body=%body, backend_config="{\\"known_trip_count\\":{\\"n\\":\\"12\\"}}"', 12),
]


@pytest.mark.parametrize(("rest", "count"), LOOPS)
def test_trip_count_of_a_loop(rest: str, count: int) -> None:
    hlo = program(f"%w = (s32[], f32[2]) while(%t), {rest}", before=LOOP)
    assert collectives(hlo, FLAT) == (Collective("all-reduce", ("model",), 8 * count, count),)


def test_branches_of_a_predicate() -> None:
    before = """
%yes (r: f32[2]) -> f32[2] {
  %a = f32[2] all-reduce(%r), replica_groups={}, to_apply=%add
  %b = f32[2] all-reduce(%r), replica_groups={}, to_apply=%add
}
%no (r: f32[2]) -> f32[2] {
  %c = f32[3] all-reduce(%r), replica_groups={}, to_apply=%add
}
"""
    for rest in ("true_computation=%yes, false_computation=%no", "branch_computations={%no, %yes}"):
        hlo = program(f"%c = f32[2] conditional(%i, %a, %b), {rest}", before=before)
        assert collectives(hlo, FLAT) == (Collective("all-reduce", ("data", "model"), 16, 2),)


SIZES = {
    "pred[10]": 10,
    "s8[3]": 3,
    "u8[3,2]{1,0}": 6,
    "s4[3]{0:E(4)}": 2,  # half a byte each, the last rounded up
    "u4[5]": 3,
    "f4e2m1fn[2]": 1,
    "f8e4m3fn[7]": 7,
    "f8e5m2[7]": 7,
    "f8e8m0fnu[7]": 7,
    "bf16[3]": 6,
    "f16[3]": 6,
    "f32[]": 4,
    "f64[3]": 24,
    "s64[0]": 0,
    "c64[3]": 24,
    "c128[3]": 48,
    "f32[<=5,2]": 40,
    "token[]": 0,
    "(s4[1], s4[1], token[], f32[2]{0:T(128)})": 10,
}


@pytest.mark.parametrize("shape", SIZES)
def test_bytes_of_each_type(shape: str) -> None:
    [one] = collectives(program(f"%r = {shape} all-reduce(%p), replica_groups={{}}, to_apply=%add"), FLAT)
    assert one.bytes == SIZES[shape]


def test_equal_collectives_are_summed_and_sorted_by_bytes() -> None:
    model, data = "replica_groups=[2,4]<=[8]", "replica_groups=[4,2]<=[2,4]T(1,0)"
    hlo = program(
        f"%a = f32[2] all-reduce(%p), {model}, to_apply=%add",
        f"%b = f32[9] all-reduce(%p), {data}, to_apply=%add",
        f"%c = f32[8] all-reduce(%p), {model}, to_apply=%add",
        f"%d = f32[1] all-gather(%p), {model}, dimensions={{0}}",
    )
    assert collectives(hlo, FLAT) == (
        Collective("all-reduce", ("model",), 40, 2),
        Collective("all-reduce", ("data",), 36, 1),
        Collective("all-gather", ("model",), 4, 1),
    )


def test_unreadable_text_is_refused() -> None:
    mesh = make_mesh(MESHES["2x4"])
    lowered = jax.jit(jnp.sin).lower(array(mesh, (8, 16), "data"))
    with pytest.raises(InputError, match=r"compiled\.as_text"):
        collectives(lowered.as_text(), mesh)
    half = Mesh(mesh.devices[:1], mesh.axis_names)
    with pytest.raises(InputError, match="over 8 devices and the mesh has 4"):
        collectives(lowered.compile().as_text(), half)
    with pytest.raises(RunError, match=r"all-reduce '@mesh<a=8> \{a\}"):
        collectives(program("%r = f32[3] all-reduce(%p), replica_groups=@mesh<a=8> {a}"), FLAT)
