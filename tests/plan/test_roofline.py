"""jaxtrain.plan.roofline and mesh_warnings: times against figures by hand."""

from __future__ import annotations

import types
from collections.abc import Mapping

import pytest

from jaxtrain.plan.collectives import Collective
from jaxtrain.plan.mesh_warnings import mesh_warnings
from jaxtrain.plan.roofline import collective_seconds, lower_bound

LINK, NETWORK = 1e9, 1e8
CARD = types.SimpleNamespace(
    name="test card", bandwidth=1e12, link=LINK, network=NETWORK, peak={"bfloat16": 1e14, "tf32": 5e13}
)
MB = 1_000_000
# kind, axes, mesh (8 GPUs in a host), seconds of 1 MB
TIMES = [
    ("all-reduce", ("data",), {"data": 8}, 2 * 7 / 8 * MB / LINK),
    ("all-gather", ("fsdp",), {"data": 2, "fsdp": 4}, 3 / 4 * MB / LINK),
    ("reduce-scatter", ("fsdp",), {"data": 2, "fsdp": 4}, 3 / 4 * MB / LINK),
    ("all-to-all", ("model",), {"data": 4, "model": 2}, 1 / 2 * MB / LINK),
    ("collective-permute", ("data",), {"data": 8}, MB / LINK),
    # over hosts: 16 GPUs are two
    ("all-reduce", ("data",), {"data": 2, "fsdp": 8}, 2 * 1 / 2 * MB / NETWORK),
    ("all-gather", ("fsdp",), {"data": 2, "fsdp": 8}, 7 / 8 * MB / LINK),
    ("all-reduce", ("data",), {"data": 16}, max(2 * 7 / 8 * MB / LINK, 2 * 1 / 2 * MB / 8 / NETWORK)),
    ("all-reduce", ("data", "fsdp"), {"data": 4, "fsdp": 8}, 2 * 3 / 4 * MB / 8 / NETWORK),
    ("all-to-all", ("data",), {"data": 16}, 8 / 16 * MB / NETWORK),
    ("collective-permute", ("data",), {"data": 16}, MB / NETWORK),
]


@pytest.mark.parametrize(("kind", "axes", "mesh", "seconds"), TIMES)
def test_time_of_a_collective(
    kind: str, axes: tuple[str, ...], mesh: Mapping[str, int], seconds: float
) -> None:
    found = collective_seconds(Collective(kind, axes, MB, 1), mesh, LINK, NETWORK)
    assert found == pytest.approx(seconds, rel=1e-12)


def test_smaller_hosts_reach_others_by_the_network() -> None:
    moved = Collective("all-reduce", ("data",), MB, 1)
    assert collective_seconds(moved, {"data": 8}, LINK, NETWORK, gpus_per_host=4) == pytest.approx(
        2 * 1 / 2 * MB / 4 / NETWORK
    )


FLOPS = 8 * 1e14 * 2e-3  # 2 ms on each of 8 devices
# memory bytes, bytes of an all-reduce (of which exposed), bound in ms, limit
BOUNDS = [
    (1_000_000_000, 0, 0, 2.0, "compute"),
    (3_000_000_000, 0, 0, 3.0, "memory"),
    (1_000_000_000, 400_000, 0, 2.0, "compute"),  # 0.7 ms, all overlapped
    (1_000_000_000, 400_000, 200_000, 2.35, "compute"),  # 0.35 ms wait
    (1_000_000_000, 4_000_000, 200_000, 7.0, "communication"),  # 7 ms
]


@pytest.mark.parametrize(("traffic", "moved", "alone", "milliseconds", "limit"), BOUNDS)
def test_bound_is_the_longest_part_and_what_is_not_overlapped(
    traffic: int, moved: int, alone: int, milliseconds: float, limit: str
) -> None:
    def reduce(size: int) -> list[Collective]:
        return [Collective("all-reduce", ("data",), size, 1)] if size else []

    bound = lower_bound(FLOPS, traffic, reduce(moved), reduce(alone), {"data": 8}, CARD, "bfloat16")
    assert bound.seconds == pytest.approx(1e-3 * milliseconds) and bound.limit == limit
    assert bound.mfu == pytest.approx(2 / milliseconds)


def test_peak_and_unknown_traffic() -> None:
    bound = lower_bound(FLOPS, None, [], [], {"data": 8}, CARD, "tf32")
    assert bound.memory is None and bound.seconds == pytest.approx(4e-3) and bound.mfu == pytest.approx(1)


RESNET = [  # imagenet_resnet50, batch 1024, data=4,model=2
    Collective("all-gather", ("model",), 9_120_000_000, 94),
    Collective("reduce-scatter", ("model",), 4_560_000_000, 48),
    Collective("all-reduce", ("data",), 51_500_000, 107),
]
STEP = 1024 * 24.6e9


def test_tensor_parallelism_that_moves_more_than_it_computes_is_warned_about() -> None:
    """(9.12 + 4.56) / 2 GB at 450 GB/s is 15.2 ms; 25.2 TFLOP at 8 x 989.5 TFLOP/s is 3.2 ms."""
    mesh = {"data": 4, "fsdp": 1, "model": 2}
    [line] = mesh_warnings(RESNET, STEP, mesh)
    assert line == (
        "model moves 13.68 GB between devices in a step (all-gather 9.12 GB, reduce-scatter 4.56 GB): "
        "at least 15.2 ms, longer than 3.2 ms of computation (peak of h100); try --mesh data=8, or "
        "data=4,fsdp=2 if the state does not fit"
    )
    assert mesh_warnings(RESNET[2:], STEP, mesh) == []
    assert mesh_warnings(RESNET, None, mesh) == []


def test_other_axes_have_other_advice() -> None:
    gather = [Collective("all-gather", ("fsdp",), 9_000_000_000, 9)]
    [line] = mesh_warnings(gather, STEP, {"data": 2, "fsdp": 4, "model": 1})
    assert line.endswith("try a larger batch, or --mesh data=8 if the state fits")
    reduce = [Collective("all-reduce", ("data", "fsdp"), 9_000_000_000, 9)]
    [line] = mesh_warnings(reduce, STEP, {"data": 2, "fsdp": 4, "model": 1})
    assert line.startswith("data+fsdp moves 9.00 GB") and line.endswith("larger batch, or fewer devices")


def test_a_card_and_a_precision_change_the_rule() -> None:
    """256 MB over the link of 1 GB/s: 448 ms of an all-reduce over 8."""
    moved = [Collective("all-reduce", ("data",), 256_000_000, 1)]
    mesh = {"data": 8}
    assert mesh_warnings(moved, 8 * 1e14 * 0.449, mesh, card=CARD) == []
    assert len(mesh_warnings(moved, 8 * 1e14 * 0.447, mesh, card=CARD)) == 1
    assert mesh_warnings(moved, 8 * 5e13 * 0.449, mesh, "float32", card=CARD) == []
    assert mesh_warnings(moved, 8 * 5e13 * 0.447, mesh, "float32", card=CARD)[0].count("test card") == 1


def test_short_steps_are_not_warned_about() -> None:
    moved = [Collective("all-reduce", ("data",), 250_000_000, 1)]  # 0.97 ms at 450 GB/s
    assert mesh_warnings(moved, 1e9, {"data": 8}) == []
    moved = [Collective("all-reduce", ("data",), 260_000_000, 1)]  # 1.01 ms
    assert len(mesh_warnings(moved, 1e9, {"data": 8})) == 1
