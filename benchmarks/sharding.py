"""What it costs to split a training step over 8 devices: 8 fake ones against 1 at the same global batch.

Eight devices that share this machine's cores compute no more than one does, so the time that they add is
the price of the split program: smaller pieces, eight copies of the update, the gradients' all-reduce, eight
times the dispatch. It says nothing about what real devices gain. Where a smaller piece is the faster one,
as in some convolutions, they may even take less.

Every family trains on made-up data in the shapes of its usual kind, in the lane that
``python -m jaxtrain bench --scaling`` times:

  data=1   one device
  data=8   eight, each with an eighth of the batch
  pieces   eight steps of an eighth of the batch on one device: what data=8 computes, without a word between
           the devices. Where data=8 takes longer than that, it is communication and waiting.

The dense network also runs at smaller batches, on two other meshes, and part by part: the update of the same
parameters, the all-reduce of the same gradients and an empty program, each alone.

  python -m benchmarks.sharding [--rounds N] [--out FILE]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import common
from jaxtrain import data, losses, models, optim, sharding
from jaxtrain.cli import devices
from jaxtrain.experiment import Experiment
from jaxtrain.plan.collectives import collectives
from jaxtrain.program import Program
from jaxtrain.train.scaling import Lane

DEVICES = 8
ONE, ALL = "data=1", f"data={DEVICES}"
PIECES = f"{DEVICES} steps of 1/{DEVICES} of the batch, 1 device"
OTHERS = (f"fsdp={DEVICES}", "data=4,model=2")
EXAMPLES = 4096
REPEATS = 20  # of a part, which is short


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload: ``chunk`` steps are timed at once, on one device, in pieces, and on each of ``meshes``.

    With ``apart`` the parts of a step are timed too.
    """

    about: str
    experiment: Experiment
    chunk: int
    meshes: tuple[str, ...] = (ALL,)
    goal: str | None = None
    apart: bool = False


def images(shape: tuple[int, ...], classes: int = 10, pixels: bool = False) -> data.Arrays:
    """Random bytes; a label for each, or with ``pixels`` one for each pixel."""
    rng, n = np.random.default_rng(0), min(EXAMPLES, 2**24 // int(np.prod(shape)))
    labels = (n, *shape[:2]) if pixels else n
    return data.Arrays(
        {
            "image": rng.integers(0, 256, (n, *shape), np.uint8),
            "label": rng.integers(0, classes, labels, np.int32),
        }
    )


def text(length: int) -> data.Arrays:
    """Bytes, each of which is to be predicted from those before."""
    tokens = np.random.default_rng(0).integers(0, 256, (EXAMPLES, length + 1), np.uint8)
    return data.Arrays({"tokens": tokens[:, :-1], "label": tokens[:, 1:].astype(np.int32)})


def reviews(most: int) -> data.Arrays:
    """Texts of up to ``most`` bytes with one of two labels."""
    rng = np.random.default_rng(0)
    return data.Arrays(
        {
            "tokens": rng.integers(1, 256, (EXAMPLES, most), np.uint8),
            "length": rng.integers(most // 2, most + 1, EXAMPLES, np.int32),
            "label": rng.integers(0, 2, EXAMPLES, np.int32),
        }
    )


def series(window: int, horizon: int, variables: int) -> data.Arrays:
    """Noise, and more of it to be forecast."""
    rows = np.random.default_rng(0).standard_normal((EXAMPLES, window + horizon, variables), np.float32)
    return data.Arrays({"series": rows[:, :window], "target": rows[:, window:]})


def ratings(users: int, items: int) -> data.Arrays:
    """Who rated what at random."""
    rng, n = np.random.default_rng(0), 16 * EXAMPLES
    who, what = rng.integers(0, users, n, np.int32), rng.integers(0, items, n, np.int32)
    return data.Arrays({"user": who, "item": what, "target": rng.integers(1, 6, n).astype(np.float32)})


def experiment(model: Any, source: data.Arrays, batch: int, **changes: Any) -> Experiment:
    """Trained as the shipped experiments of its kind are; nothing is evaluated."""
    settings: dict[str, Any] = {
        "loss": losses.CrossEntropy(),
        "optimizer": optim.AdamW(lr=1e-3, weight_decay=0.01, clip=1.0),
        "eval_every": None,
    }
    if "image" in source.fields:
        settings |= {"preprocess": (data.Normalise(),), "optimizer": optim.SGD(lr=0.01, momentum=0.9)}
    return Experiment(
        model=model, train=source, test=source, batch=batch, epochs=1000, **(settings | changes)
    )


def cases() -> dict[str, Case]:
    """A member of every family, of 5 to 300 ms a step on two cores."""
    digits, photographs = images((28, 28, 1)), images((32, 32, 3))
    augment = (data.Flip(), data.Crop(pad=4))
    dense = {batch: experiment(models.MLP(widths=(512, 512)), digits, batch) for batch in (2048, 512, 128)}
    resnet = models.ResNet(stages=(2, 2, 2, 2), block="basic", stem="cifar", width=16, classes=10)
    gpt = models.GPT(vocab=256, context=64, width=128, depth=4, heads=4, dropout=0.0)
    lstm = models.LSTMClassifier(vocab=256, width=64, embedding=64, bidirectional=True, dropout=0.5)
    gru = models.GRUForecaster(width=64, horizon=24, variables=7, dropout=0.2)
    factors = models.Factors(users=943, items=1682, width=32, dropout=0.2)
    mlp = "784-512-512-10, 0.67 M parameters, SGD with momentum"
    return {
        "mlp": Case(mlp, dense[2048], chunk=5, meshes=(ALL, *OTHERS), goal="<= 1.3", apart=True),
        "mlp, batch 512": Case(mlp, dense[512], chunk=10, meshes=(ALL, *OTHERS), apart=True),
        "mlp, batch 128": Case(mlp, dense[128], chunk=20, apart=True),
        "cnn": Case(
            "widths 16 and 32, 32 × 32 × 3, BatchNorm, flips and crops",
            experiment(models.CNN(widths=(16, 32), convs=1), photographs, 128, augment=augment),
            chunk=10,
        ),
        "resnet18": Case("width 16, 32 × 32 × 3", experiment(resnet, photographs, 32), chunk=3),
        "gpt": Case("width 128, depth 4, context 64", experiment(gpt, text(64), 16), chunk=5),
        "unet": Case(
            "widths 8, 16 and 32, 32 × 32 × 3",
            experiment(models.UNet(widths=(8, 16, 32)), images((32, 32, 3), 3, pixels=True), 32),
            chunk=5,
        ),
        "lstm": Case("width 64 in both directions, 32 tokens", experiment(lstm, reviews(32), 128), chunk=5),
        "gru": Case(
            "width 64, 48 hours to 24",
            experiment(gru, series(48, 24, 7), 128, loss=losses.Forecast(), select="-loss"),
            chunk=5,
        ),
        "factors": Case(
            "943 users, 1682 items, width 32",
            experiment(factors, ratings(943, 1682), 4096, loss=losses.MSE(), select="-rmse"),
            chunk=20,
        ),
    }


def mesh_of(name: str) -> Any:
    """The mesh of that text; ``ONE`` is one device."""
    used = jax.devices()[: 1 if name == ONE else DEVICES]
    return sharding.make_mesh(used, sharding.parse_mesh(name, len(used)))


def whole_steps(case: Case, lanes: Mapping[str, Lane]) -> dict[str, Callable[[], float]]:
    """Sides for ``interleaved``: a step on each of the lanes, and one in pieces."""
    fewer = dataclasses.replace(case.experiment, batch=case.experiment.batch // DEVICES)
    pieces = functools.partial(Lane(fewer, mesh_of(ONE)).round, DEVICES * case.chunk)
    sides = {
        mesh: common.each(functools.partial(lane.round, case.chunk), case.chunk)
        for mesh, lane in lanes.items()
    }
    return {**sides, PIECES: common.each(pieces, case.chunk)}


def parts(lanes: Mapping[str, Lane]) -> dict[str, Callable[[], float]]:
    """What splitting adds to a step, one thing at a time: sides for ``interleaved``."""
    mesh = mesh_of(ALL)
    replicated, split = sharding.replicated(mesh), sharding.batch_split(mesh)
    size = sum(x.size for x in jax.tree.leaves(lanes[ALL].program.abstract_state.params))
    rows = jax.device_put(np.ones((DEVICES, size), np.float32), split)
    small = jax.device_put(np.zeros((), np.float32), replicated)
    reduce = sharding.compile(lambda x: x.sum(0), args=(split,), out=replicated)
    nothing = sharding.compile(lambda x: x + 1, args=(replicated,), out=replicated)

    def repeat(fn: Callable[[Any], Any], x: Any) -> Callable[[], float]:
        return common.each(lambda: [jax.block_until_ready(fn(x)) for _ in range(REPEATS)], REPEATS)

    return {
        "update, 1 device": updates(lanes[ONE].program),
        f"update, {DEVICES} devices": updates(lanes[ALL].program),
        f"all-reduce of the gradients, {DEVICES} devices": repeat(reduce, rows),
        f"empty program, {DEVICES} devices": repeat(nothing, small),
    }


def updates(program: Program) -> Callable[[], float]:
    """The optimizer alone, on the program's parameters."""
    tx = program.experiment.optimizer.build(program.steps)
    replicated = sharding.replicated(program.key.sharding.mesh)

    def update(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    fn = sharding.compile(update, args=(replicated,) * 3, out=(replicated, replicated), donate=(0, 1))
    state, grads = program.init(), program.init().params
    buffers = [state.params, state.opt_state]

    def work() -> None:
        for _ in range(REPEATS):
            buffers[:] = fn(*buffers, grads)
        jax.block_until_ready(buffers)

    return common.each(work, REPEATS)


def communication(lane: Lane) -> dict[str, dict[str, int]]:
    """What a step moves between the devices: how many collectives and how many bytes, by kind and axes."""
    program = lane.program
    compiled = program.train_step.lower(program.abstract_state, program.train.batch(0), program.key).compile()
    return {
        f"{one.kind} over {','.join(one.axes)}": {"count": one.count, "bytes": one.bytes}
        for one in collectives(compiled.as_text(), lane.mesh)
    }


def main() -> None:
    """Every family in turn, one JSON object."""
    args = common.arguments(__doc__, rounds=12).parse_args()
    devices.simulate_devices(DEVICES)
    results, figures = [], {}
    for name, case in cases().items():
        lanes = {mesh: Lane(case.experiment, mesh_of(mesh)) for mesh in (ONE, *case.meshes)}
        sides = whole_steps(case, lanes) | (parts(lanes) if case.apart else {})
        times = common.interleave(sides, args.rounds)
        figures[name] = {
            "model": case.about,
            "batch": case.experiment.batch,
            "steps a round": case.chunk,
            "ms": common.medians(times, 1e3),
            "moved": {mesh: communication(lanes[mesh]) for mesh in case.meshes},
        }
        for mesh in case.meshes:
            goal = case.goal if mesh == ALL else None
            label = f"{name}: time of a step on {mesh} over 1 device"
            results.append(common.speedup(label, times[mesh], times[ONE], goal))
        label = f"{name}: time of a step on {ALL} over its pieces on 1 device"
        results.append(common.speedup(label, times[ALL], times[PIECES]))
    common.finish(args, "sharding", results, figures)


if __name__ == "__main__":
    main()
