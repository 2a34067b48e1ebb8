"""Whether a run may be made longer depends on what its optimizer computes, not on how it is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import Experiment, InputError, State, assemble, data, losses, models, optim
from jaxtrain.program import abstract_state
from jaxtrain.train.run_length import check_length, depends_on_length


@dataclasses.dataclass(frozen=True)
class Own:
    """An optimizer of the user's own."""

    kind: str

    def build(self, steps: int | None = None) -> Any:
        table = np.full(50, 0.1, np.float32)
        table[49] = steps
        schedules: dict[str, Any] = {
            "cosine": optax.cosine_decay_schedule(1e-3, steps or 1),
            "constant": 0.1,
            "own constant": lambda count: 0.1 / (1 + count / 100),
            "table": lambda count: jnp.asarray(table)[count],
        }
        if self.kind == "in the state":
            return optax.inject_hyperparams(optax.sgd)(learning_rate=1.0 / (steps or 1))
        return optax.lion(schedules[self.kind])


@dataclasses.dataclass(frozen=True)
class Stage:
    """A post-update stage that is built for the run, and may not use its length."""

    used: bool

    def build(self, steps: int) -> Any:
        def stage(state: State) -> State:
            scale = 1 - 1 / steps if self.used else 0.5
            return state.replace(params={name: scale * p for name, p in state.params.items()})

        return stage


def init(key: Any, batch: Any) -> Any:
    return {"w": jnp.zeros((2, 2)), "b": jnp.zeros((2, 2))}, {}


def apply(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
    return batch["x"] @ params["w"] @ params["b"], extra


SOURCE = data.Arrays({"x": np.ones((20, 2), np.float32), "label": np.zeros(20, np.int32)})
EXPERIMENT = Experiment(
    model=models.as_model((init, apply)),
    train=SOURCE,
    test=SOURCE,
    loss=losses.CrossEntropy(),
    optimizer=Own("cosine"),
    batch=10,
    epochs=5,
)


@pytest.mark.parametrize(
    ("optimizer", "post_update", "depends"),
    [
        (Own("cosine"), (), True),
        (Own("table"), (), True),
        (Own("in the state"), (), True),
        (Own("constant"), (), False),
        (Own("own constant"), (), False),
        (optim.SGD(lr=0.1), (optim.EMA(),), False),
        (optim.Adam(lr=optim.Constant(0.1)), (), False),
        (optim.Adam(lr=optim.Constant(0.1, warmup=0.5)), (), True),
        (optim.SGD(lr=optim.OneCycle(peak=0.1), momentum=0.9), (), True),
        (optim.SGD(lr=0.1, groups=(optim.Group("w", until=0.5),)), (), True),
        (optim.SGD(lr=0.1, groups=(optim.Group("w", lr=0.5),)), (), False),
        (optim.SGD(lr=0.1), (optim.Lookahead(),), True),
        (optim.SGD(lr=0.1), (Stage(used=True),), True),
        (optim.SGD(lr=0.1), (Stage(used=False),), False),
    ],
    ids=str,
)
def test_the_updates_tell(optimizer: Any, post_update: Any, depends: bool, mesh1: Any) -> None:
    exp = dataclasses.replace(EXPERIMENT, optimizer=optimizer, post_update=post_update)
    state = abstract_state(exp, mesh1, SOURCE.gather(np.arange(1)))
    assert depends_on_length(exp, state, 10, 12) is depends
    assert not depends_on_length(exp, state, 10, 10)


def test_what_is_refused(mesh1: Any) -> None:
    program = assemble(EXPERIMENT, mesh1)  # 5 epochs, 10 steps
    program.close()

    def check(epochs: float, steps: int | None, extend: bool = False) -> None:
        known = {"config": {"epochs": str(epochs)}} | ({} if steps is None else {"steps": steps})
        check_length(program, known, Path("r"), extend)

    check(5, 10)
    check(5, None)
    with pytest.raises(
        InputError, match="epochs is 3 there and 5 here; its schedule depends on the number of"
    ):
        check(3, 6)
    with pytest.raises(InputError, match="epochs is 3 there and 5 here"):
        check(3, None)  # a record without the number of steps
    check(3, 6, extend=True)
    with pytest.raises(InputError, match=r"steps is 8 there and 10 here; .* --extend"):
        check(5, 8)  # the data have grown
    with pytest.raises(InputError, match=r"a run of 12 steps and the data now give 10: .* --new"):
        check(5, 12, extend=True)
