"""Train steps compiled for an H100, on a machine without one: what must hold, and figures that are recorded.

Each program is compiled once, by the command that a user types. The nightly tier compiles every row of the
table of all shipped experiments (``benchmarks/gpu_programs.py``) again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import pytest
from conftest import ROOT
from gpu_programs import HOST, half_reductions, layout_swaps, needs_compiler

from benchmarks import gpu_programs as table
from jaxtrain import __main__ as commands
from jaxtrain import plan
from jaxtrain.core.text import size_text
from jaxtrain.program import Program
from jaxtrain.program.memory import mesh_of

GOLDEN = ROOT / "tests" / "golden" / "gpu_programs.json"
TABLE = table.RESULTS / "h100.json"
ABOUT = [
    "Train steps compiled for an H100: collectives by kind and mesh axes, activations that change",
    "their layout, and two ceilings (3 % above is accepted): launches, and bytes of temporaries.",
    "To record them again: JAXTRAIN_UPDATE_GOLDEN=1 scripts/test --full tests/plan/test_gpu_goldens.py",
    "Do it where a change is meant to alter the programs, and say in the commit what each changed figure is",
    "good for. Do not do it to make a test pass: a higher ceiling, another collective or another swap needs",
    "a reason. Another version of jax needs new figures: look at the difference as at any other change.",
]
SMALL = {
    "digits_cnn": ("digits_cnn", "--set", "precision=bfloat16"),
    "gpt": ("shakespeare_gpt", "--set", "model.depth=2", "--set", "precision=bfloat16"),
    "resnet": ("imagenet_resnet50", "--set", "model.stages=(1,1)"),
    "vit": ("imagenet_vit_s16", "--set", "model.depth=2"),
}
ATTENTION = {"gpt": 2, "vit": 2}  # layers
EIGHT = "data=2,fsdp=4"
CASES = ("digits_cnn", *(f"{name}{mesh}" for name in ("gpt", "resnet", "vit") for mesh in ("", f" {EIGHT}")))


class Compiled(NamedTuple):
    """A train step, what its command printed, and the figures that are recorded."""

    case: str
    output: str
    program: Program
    text: str
    figures: dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Compile the train step of a case; where the figures are to be recorded, do that."""
    name, _, mesh = request.param.partition(" ")
    devices = ("--devices", "8", "--mesh", mesh) if mesh else ("--devices", "1")
    module, found, output = importlib.import_module("jaxtrain.plan.measure"), [], io.StringIO()
    compile_step = module._compile

    def collect(program: Program, mesh: Any) -> Any:
        compiled = compile_step(program, mesh)
        found.append((program, compiled[0]))
        return compiled

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(tmp_path_factory.mktemp("empty"))
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("no data")))
        for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
            patch.delenv(variable, raising=False)
        patch.setattr(module, "_compile", collect)
        assert commands.main(["plan", "--for", "h100", "--experiment", *SMALL[name], *devices]) == 0
    [(program, compiled)] = found
    text, temporaries = compiled.as_text(), int(compiled.memory_analysis().temp_size_in_bytes)
    made = Compiled(request.param, output.getvalue(), program, text, figures(program, text, temporaries))
    if os.environ.get("JAXTRAIN_UPDATE_GOLDEN") == "1":
        write_golden(made)
    yield made


def state_shapes(program: Program) -> list[tuple[int, ...]]:
    """The shapes of the state's arrays, of all devices together and of one."""
    leaves = jax.tree.leaves(program.abstract_state)
    return [shape for leaf in leaves for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))]


def figures(program: Program, text: str, temporaries: int) -> dict[str, Any]:
    """What is recorded of a program."""
    mesh = mesh_of(program)
    moved = plan.collectives(text, mesh)
    return {
        "collectives": sorted(
            f"{one.count} {one.kind} over {' and '.join(one.axes)}: {one.bytes:,} bytes" for one in moved
        ),
        "layout_swaps": layout_swaps(text, state_shapes(program)),
        "launches": plan.read_gpu_program(text, mesh).launches,
        "temporaries": temporaries,
    }


def compiler() -> str:
    """The version of JAX, and of the CUDA that its compiler is made for."""
    names = ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
    installed = {one.metadata["Name"] for one in importlib.metadata.distributions()}
    return f"jax {jax.__version__}, {next(name for name in names if name in installed)}"


def write_golden(step: Compiled) -> None:
    rows = json.loads(GOLDEN.read_text())["programs"] if GOLDEN.exists() else {}
    rows[step.case] = {"compiler": compiler(), **step.figures}
    body = {"about": ABOUT, "programs": {case: rows[case] for case in CASES if case in rows}}
    GOLDEN.write_text(json.dumps(body, indent=1) + "\n")


@pytest.fixture
def golden(step: Compiled) -> dict[str, Any]:
    """The recorded figures; skips the test where they are those of another compiler."""
    row = json.loads(GOLDEN.read_text())["programs"][step.case]
    if row["compiler"] != compiler():
        pytest.skip(f"recorded with {row['compiler']}, and this is {compiler()}: {ABOUT[2]}")
    return row


@needs_compiler
@pytest.mark.full("[digits_cnn]")
def test_every_array_of_the_state_is_updated_in_place(step: Compiled) -> None:
    leaves = len(jax.tree.leaves(step.program.abstract_state))
    header = step.text.partition("\n")[0]
    inputs = [int(number) for number in re.findall(r"\}: \((\d+), \{\}, (?:may|must)-alias", header)]
    assert sorted(inputs) == list(range(leaves))  # the state is the step's first argument
    assert re.search(rf"^  outputs that reuse an input +{leaves}  of {leaves + 1} outputs", step.output, re.M)


@needs_compiler
@pytest.mark.full("[digits_cnn]")
def test_nothing_waits_for_the_host(step: Compiled) -> None:
    """Memory kinds are not in the program of a GPU that is not here, and JAX's callbacks do not compile."""
    assert not [name for name in HOST if name in step.text]
    assert re.search(r"^  waits for the host +0$", step.output, re.M)


@needs_compiler
@pytest.mark.full(
    "[digits_cnn]",
    "tests/models/test_attention.py::test_half_precision_on_a_gpu_uses_cudnn_forward_and_backward",
)
def test_attention_is_one_call_of_cudnn_forward_and_one_backward_in_each_layer(step: Compiled) -> None:
    calls = re.findall(r'custom_call_target="__cudnn\$fmha(\w*)"', step.text)
    backward = [name for name in calls if name.endswith("Backward")]
    layers = ATTENTION.get(step.case.partition(" ")[0], 0)
    assert (len(calls), len(backward)) == (2 * layers, layers)


@needs_compiler
@pytest.mark.full(
    "[digits_cnn]",
    "tests/step/test_float32_sums.py::test_no_sum_of_a_train_step_accumulates_in_half_precision",
)
def test_no_reduction_adds_in_half_precision(step: Compiled) -> None:
    assert " reduce(" in step.text and " bf16[" in step.text
    assert half_reductions(step.text) == []


@needs_compiler
@pytest.mark.full("[digits_cnn]", "tests/plan/test_collectives.py")
def test_collectives_are_golden(step: Compiled, golden: dict[str, Any]) -> None:
    """How to record them, and when not to: ``about`` in tests/golden/gpu_programs.json."""
    assert bool(golden["collectives"]) is (EIGHT in step.case)
    assert step.figures["collectives"] == golden["collectives"]


@needs_compiler
@pytest.mark.full("[digits_cnn]")
def test_activations_that_change_their_layout_are_golden(step: Compiled, golden: dict[str, Any]) -> None:
    """How to record them, and when not to: ``about`` in tests/golden/gpu_programs.json."""
    assert step.figures["layout_swaps"] == golden["layout_swaps"]


@needs_compiler
@pytest.mark.full("[digits_cnn]")
def test_launches_and_temporaries_stay_below_their_ceilings(step: Compiled, golden: dict[str, Any]) -> None:
    """A higher ceiling needs a reason: ``about`` in tests/golden/gpu_programs.json."""
    found = step.figures
    above = {
        n: (found[n], golden[n]) for n in ("launches", "temporaries") if found[n] > table.MARGIN * golden[n]
    }
    assert not above, "(found, recorded)"


@needs_compiler
@pytest.mark.parametrize("step", ["digits_cnn"], indirect=True)
def test_command_prints_the_program_of_an_h100(step: Compiled) -> None:
    out = step.output
    calls = step.text.count('custom_call_target="__cudnn$')
    assert calls > 3
    size = re.escape(size_text(step.figures["temporaries"]))
    remark = f"a lower bound: without the workspace of {calls} cuDNN calls"
    assert re.search(rf"^  temporaries +{size} +\d+ %  {remark}$", out, re.M)
    assert out.startswith("digits_cnn on 1 × NVIDIA H100 80GB HBM3, batch 128, 330 steps\n")
    assert re.search(r"^verdict: fits: [\d.]+ MB of 63.71 GB \(0 %\) on each device$", out, re.M)
    assert "  limit: 75 % of the card's 84.94 GB, JAX's default" in out
    assert re.search(r"^  not in it is a workspace of cuDNN, at most 4.29 GB; 63.\d+ GB are left$", out, re.M)
    assert re.search(r"^  convolution +__cudnn\$convBackwardFilter +\d", out, re.M)
    assert "  step, at least  " in out
    assert "CPU figures" not in out and max(map(len, out.splitlines())) < 100
    titles = ("GPU program: kernels of a step on each device", "launches", "lower bound of a step")
    assert all(f"\n\n{title}" in out for title in titles)


def test_every_case_is_golden() -> None:
    rows = json.loads(GOLDEN.read_text())
    assert (list(rows["programs"]), rows["about"]) == (list(CASES), ABOUT)


def test_differences_from_a_row_of_the_table_are_named() -> None:
    moved = {"kind": "all-reduce", "axes": ["data"], "count": 2, "bytes": 100, "overlapped": 1}
    row = {"aliased": 9, "launches": 100, "bytes_per_device": {"temporaries": 1000}, "overlap": [moved]}
    other = {
        "aliased": 9,
        "launches": 90,
        "bytes_per_device": {"temporaries": 1040},
        "overlap": [moved | {"bytes": 50}],
    }
    assert table.differences(row, row | {"launches": 103, "overlap": [moved | {"overlapped": 0}]}) == []
    assert table.differences(row, other) == [
        "collectives: [['all-reduce', ['data'], 2, 100]] before, now [['all-reduce', ['data'], 2, 50]]",
        "temporaries: 1000 before, now 1040",
    ]
    [line] = table.differences({"aliased": 9}, {"aliased": 9, "error": "XLA cannot compile"})
    assert line == "error: None before, now XLA cannot compile"


@needs_compiler
@pytest.mark.nightly("tests/plan/test_gpu_goldens.py::test_differences_from_a_row_of_the_table_are_named")
@pytest.mark.parametrize(
    ("key", "arguments"), [pytest.param(*case, id=case[0]) for case in table.cases(table.names())]
)
def test_program_is_that_of_the_committed_table(key: str, arguments: tuple[str, ...]) -> None:
    """Record the table again with ``python -m benchmarks.gpu_programs --again``, where a change is meant."""
    if not TABLE.exists():
        pytest.skip(f"{TABLE.name} is not recorded: python -m benchmarks.gpu_programs")
    recorded = json.loads(TABLE.read_text())
    if recorded["jax"] != jax.__version__:
        pytest.skip(f"{TABLE.name} is of jax {recorded['jax']}, and this is {jax.__version__}")
    assert key in recorded["rows"], "this row is not recorded: python -m benchmarks.gpu_programs"
    assert table.differences(recorded["rows"][key], table.compile_one(arguments, "h100")) == []
