"""jaxtrain.train.recompile: a train step compiled a second time names what changed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tiny import EXPERIMENT, split

from jaxtrain import data, models, monitor, run, sharding
from jaxtrain.core.errors import RunError
from jaxtrain.monitor.console import Plain
from jaxtrain.program import assemble
from jaxtrain.train.loop import fit
from jaxtrain.train.recompile import OneCompile

CHANGES = {
    "shape": (jnp.zeros(3), "batch/x was float32[2] on cpu:0 by default and is float32[3]"),
    "type": (jnp.zeros(2, jnp.int8), "batch/x was float32[2] on cpu:0 by default and is int8[2]"),
    "weak type": (
        jnp.asarray(1.0),
        "batch/x was float32[] on cpu:0 by default and is float32[] weak on cpu:0",
    ),
    "sharding": (None, "batch/x was float32[2] on cpu:0 by default and is float32[2] split (data)"),
    "host": (np.zeros(2, np.float32), "and is float32[2] on the host"),
    "field": ({"x": jnp.zeros(2), "y": jnp.zeros(2)}, "batch/y was absent and is float32[2]"),
}


def add(state, batch, key):
    return {"w": state["w"] + batch["x"].sum()}


def watched(lines, strict=False):
    return OneCompile(jax.jit(add, donate_argnums=0), 0, lines.append, strict)


def state():
    return {"w": jnp.zeros(4)}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changed_is_named_once(kind):
    given, message = CHANGES[kind]
    first = {"x": jnp.zeros(2)}
    if kind == "sharding":
        mesh = sharding.make_mesh(jax.devices()[:2])
        given = jax.device_put(jnp.zeros(2), jax.NamedSharding(mesh, jax.P("data")))
    if kind == "weak type":
        first = {"x": jnp.float32(1)}
    second = given if isinstance(given, dict) else {"x": given}
    lines: list[str] = []
    step = watched(lines)
    for _ in range(3):
        step(state(), first, None)
    assert lines == []
    for batch in (second, first, second, {"x": jnp.zeros(7)}):
        step(state(), batch, None)
    assert len(lines) == 1 and message in lines[0] and "at step 4:" in lines[0] and "\n" not in lines[0]


def test_a_change_of_the_state_is_named_although_it_is_donated():
    lines: list[str] = []
    step = watched(lines, strict=True)
    step(state(), {"x": jnp.zeros(2)}, None)
    with pytest.raises(RunError, match=r"state/w was float32\[4\] .* and is int32\[4\] .*allows one compile"):
        step({"w": jnp.zeros(4, jnp.int32)}, {"x": jnp.zeros(2)}, None)
    assert lines == []


def test_a_setting_of_jax_is_suspected_where_no_argument_changed():
    lines: list[str] = []
    step = watched(lines)
    step(state(), {"x": jnp.zeros(2)}, None)
    with jax.default_matmul_precision("highest"):
        step(state(), {"x": jnp.zeros(2)}, None)
    assert "no argument changed, so a setting of JAX did" in lines[0]


@dataclasses.dataclass(frozen=True)
class Fickle:
    """Images whose type changes once example 150 has a part in the batch."""

    n: int = 200

    def __len__(self):
        return self.n

    def gather(self, indices):
        fields = split(self.n, 0).gather(indices)
        wide = np.any(np.asarray(indices) == 150) and len(indices) == 16
        return {**fields, "image": fields["image"].astype(np.int16)} if wide else fields


@pytest.mark.full("tests/train/test_recompile.py::test_resident_data_compiles_once_under_strict")
def test_the_loop_warns_or_ends(tmp_path, capsys, mesh1):
    exp = dataclasses.replace(
        EXPERIMENT, model=models.MLP(widths=(), classes=4), train=Fickle(), augment=(), placement="stream"
    )
    program = assemble(exp, mesh1)
    bad = next(k for k in range(1, 14) if 150 in program.order.indices(k - 1))
    assert bad > 1
    what = f"at step {bad}: batch/image was uint8[16,8,8,1] split (('data', 'fsdp')) over 1 devices"
    fit(program, tmp_path / "warned", Plain())
    assert what in capsys.readouterr().out
    with pytest.raises(RunError) as error:
        fit(assemble(exp, mesh1), tmp_path / "strict", Plain(), strict=True)
    assert what in str(error.value) and "and is int16[16,8,8,1]" in str(error.value)


@pytest.mark.full("tests/train/test_recompile.py::test_resident_data_compiles_once_under_strict")
def test_the_flag_makes_it_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fickle.py"
    path.write_text(
        '"""A source that changes its type."""\n'
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import dataclasses\nfrom test_recompile import Fickle\nfrom tiny import EXPERIMENT as TINY\n"
        "from jaxtrain import models\n"
        "EXPERIMENT = dataclasses.replace(TINY, model=models.MLP(widths=(), classes=4), train=Fickle(),\n"
        "    augment=(), placement='stream', epochs=0.9)\n"
    )
    code = run.main(["--experiment", str(path), "--devices", "1", "--strict"])
    assert code == 3 and "was compiled again at step" in capsys.readouterr().err


def test_resident_data_compiles_once_under_strict(tmp_path, mesh1):
    """Two epochs, evaluations and saves between them."""
    exp = dataclasses.replace(EXPERIMENT, model=models.MLP(widths=(), classes=4), augment=(), epochs=2)
    assert fit(assemble(exp, mesh1), tmp_path, monitor.make_console(), strict=True)["steps"] == 25
    assert isinstance(exp.train, data.Arrays)
