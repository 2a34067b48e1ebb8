"""python -m jaxtrain plan --for CARD: the program of a GPU that is not here, and the errors before it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from gpu_programs import HOST, needs_compiler

from jaxtrain import __main__ as commands
from jaxtrain import data, plan, sharding
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import find
from jaxtrain.plan import report
from jaxtrain.plan.absent_data import AbsentData, StreamedAbsentData
from jaxtrain.plan.measure import WORKSPACE
from jaxtrain.program import assemble, device_limits
from jaxtrain.program.device_limits import Limit
from jaxtrain.program.memory import abstract_args
from jaxtrain.sharding import cards, described

TINY = str(Path(__file__).parents[1] / "tiny.py")
OWN = '''
"""A user's experiment: its data are on another machine."""
import numpy as np
from jaxtrain import Experiment, data, losses, models, optim


class Tokens:
    def __len__(self):
        return 5000

    def gather(self, indices):
        raise FileNotFoundError("tokens.npy is not here")

    def example(self):
        return {"tokens": np.zeros((1, 64), np.int32), "label": np.zeros((1, 64), np.int32)}


EXPERIMENT = Experiment(
    model=models.GPT(vocab=128, context=64, width=64, depth=1, heads=1, dropout=0.0),
    train=Tokens(), test=Tokens(), loss=losses.CrossEntropy(), optimizer=optim.AdamW(lr=1e-3),
    batch=32, epochs=1, precision="bfloat16",
)
'''


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def programs(monkeypatch):
    """Collect ``(program, compiled)`` of everything that is measured."""
    module, found = importlib.import_module("jaxtrain.plan.measure"), []
    compile_step = module._compile

    def collect(program, mesh):
        compiled = compile_step(program, mesh)
        found.append((program, compiled[0]))
        return compiled

    monkeypatch.setattr(module, "_compile", collect)
    return found


def plan_for(capsys, *args) -> dict:
    assert commands.main(["plan", "--json", "--experiment", *args]) == 0
    return json.loads(capsys.readouterr().out)


@needs_compiler
@pytest.mark.full("tests/plan/test_gpu_report.py::test_json_has_every_figure")
def test_json_has_the_gpu_program_with_attention_by_layer(capsys, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    options = ("--for", "h100", "--devices", "2", "--set", "precision=float32")
    found = plan_for(capsys, str(tmp_path / "own.py"), *options)["gpu"]
    graphs = found["cuda_graphs"]
    assert found["launches"] == sum(one["count"] for one in found["kernels"])
    assert found["launches"] == graphs["inside"] + graphs["outside"]
    [layer] = found["attention"]
    assert (layer["layer"], layer["kernel"], layer["shape"]) == ("block0", "xla", [32, 64, 1, 64])
    assert layer["reason"] == "it takes float16 and bfloat16, and this is float32"
    assert found["overlap"][0]["axes"] == ["data"] and found["host"] == []
    assert found["lower_bound"]["seconds"] > 0 and found["lower_bound"]["peak"] == 494.5e12


@pytest.mark.full("tests/plan/test_plan.py::test_json_is_complete_and_agrees_with_the_table")
def test_a_plan_for_cpus_says_where_the_figures_of_a_gpu_are(capsys):
    assert commands.main(["plan", "--experiment", TINY, "--devices", "1"]) == 0
    assert "  CPU figures: temporaries are 1.4 to 4 times those of a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--for", "h10"], "--for h10: no card has this name: "),
        (["--for", "mine.toml"], "--for mine.toml: the file cannot be read: No such file or directory"),
        (["--hosts", "2"], "--hosts 2 needs --for"),
        (["--for", "h100", "--devices", "3", "--hosts", "2"], "--hosts 2 with 3 devices: each host has the"),
        (["--for", "h100", "--devices", "3", "--hosts", "2"], "use --devices 2, or another multiple of 2"),
        (["--for", "h100", "--mesh", "data=4", "--hosts", "0"], "--hosts 0: give at least 1"),
        (["--for", "h100", "--devices", "0"], "--devices 0: give at least 1"),
        (["--for", "h100", "--devices", "4000"], "4000 devices: plan compiles for at most 1024"),
        (["--for", "h100", "--devices", "4", "--mesh", "fsdp=8"], "than --devices 4: use --devices 8, or"),
        (["--for", "h100", "--devices", "8", "--mesh", "data=4"], "--mesh data=4 uses 4 of 8 devices"),
        (["--for", "h100", "--simulate-devices", "8"], "--simulate-devices 8 does not go with --for"),
    ],
)
def test_a_wrong_flag_is_one_line(args, says, capsys):
    assert commands.main(["plan", "--experiment", TINY, *args]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_small_remainder_makes_the_verdict_uncertain():
    found = plan.Plan(
        mesh={},
        platform="gpu",
        batch=1,
        accumulate=1,
        remat="none",
        precision="float32",
        resident=(),
        parameters=1,
        bytes={"temporaries": 10, "outputs": 0},
        flops=None,
        collectives=(),
        largest=(),
        notes=(),
        card=cards.load_card("h100"),
        cudnn_calls=2,
    )
    enough, little = (report.verdict_text(found, Limit(10 + n, "")) for n in (WORKSPACE, WORKSPACE - 1))
    assert "UNCERTAIN" not in enough and "  UNCERTAIN: not in it is a workspace of cuDNN" in little
    bodies = (report.as_json(found, Limit(10 + n, "")) for n in (WORKSPACE, WORKSPACE - 1, -1))
    assert [(one["fits"], one["uncertain"]) for one in bodies] == [
        (True, False),
        (True, True),
        (False, False),
    ]


@needs_compiler
def test_a_step_that_calls_python_is_one_line(capsys, tmp_path):
    """JAX asks the GPU's client, which is not here, to hold the function."""
    text = """
        import dataclasses, jax, numpy as np
        from jaxtrain import Experiment, data, losses, models, optim

        @dataclasses.dataclass(frozen=True)
        class Printed:
            def __call__(self, outputs, batch):
                jax.debug.print("{}", outputs[0, 0])
                return losses.CrossEntropy()(outputs, batch)

        SOURCE = data.Arrays({"image": np.zeros((64, 2), np.float32), "label": np.arange(64) % 2})
        EXPERIMENT = Experiment(
            model=models.MLP(widths=(4,), classes=2), train=SOURCE, test=SOURCE, loss=Printed(),
            optimizer=optim.SGD(lr=0.1), batch=8, epochs=1,
        )
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(text))
    assert commands.main(["plan", "--experiment", str(tmp_path / "own.py"), "--for", "h100"]) == 2
    error = capsys.readouterr().err
    assert "the train step calls Python (jax.debug.print" in error and error.count("\n") == 1


def test_absent_data_are_planned_from_their_description(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    experiment, notes = plan.describe_absent(find("mnist_keras_cnn").load()[0])
    assert notes == tuple(
        f"{split}: mnist is not prepared here: planned from its description" for split in ("train", "test")
    )
    assert type(experiment.train) is AbsentData and plan.length_known(experiment.train)
    assert (len(experiment.train), len(experiment.test)) == (60_000, 10_000)
    two = experiment.train.gather(np.arange(2))
    assert two["image"].shape == (2, 28, 28, 1) and two["image"].dtype == np.uint8

    experiment, notes = plan.describe_absent(find("sentiment_lstm").load()[0])
    assert isinstance(experiment.train, StreamedAbsentData) and not plan.length_known(experiment.train)
    assert all(note.endswith(", as streamed") for note in notes)
    changed, resident = plan.for_device_memory(experiment, Limit(10**12, ""))
    assert changed.placement == "stream" and not any(resident.values())

    digits = find("digits_cnn").load()[0]
    assert plan.describe_absent(digits) == (digits, ())


def test_absent_data_without_a_description_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    digits = find("digits_cnn").load()[0]
    unknown = dataclasses.replace(digits, train=data.TFDS("kitti", "train"))
    with pytest.raises(InputError, match=r"^train: kitti is not prepared here, and the shapes .* prepare it"):
        plan.describe_absent(unknown)


@needs_compiler
@pytest.mark.full("tests/plan/test_gpu_goldens.py::test_command_prints_the_program_of_an_h100")
def test_a_users_file_without_its_data_on_eight_gpus_of_two_hosts(capsys, programs, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    found = plan_for(capsys, str(path), "--for", "a100", "--mesh", "data=2,fsdp=4", "--hosts", "2")
    assert found["for"] == {
        "card": "a100",
        "hosts": 2,
        "devices_per_host": 4,
        "memory": cards.load_card("a100").memory,
        "compute_capability": [8, 0],
    }
    assert found["devices"] == {"count": 8, "kind": "NVIDIA A100-SXM4-80GB", "simulated": False}
    assert found["compiled_for"] == "gpu" and found["steps"] == 157 and found["fits"] is True
    moved = {(one["kind"], tuple(one["axes"])) for one in found["collectives"]}
    assert {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))} <= moved
    assert found["cudnn"] == {"calls": 2, "workspace_at_most": WORKSPACE}  # attention, forward and backward
    assert found["notes"][0].startswith("train: Tokens cannot be read here (tokens.npy is not here)")
    [(program, _)] = programs
    assert program.train.batch(0)["data"]["tokens"].shape == (5000, 64)  # a shape: nothing is stored


@needs_compiler
@pytest.mark.full("tests/plan/test_gpu_goldens.py::test_command_prints_the_program_of_an_h100")
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py")))
def test_every_shipped_experiment_is_lowered_for_two_gpus_without_its_data(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    experiment, notes = plan.describe_absent(find(name).load()[0])
    assert bool(notes) is (name != "digits_cnn")
    mesh = sharding.make_mesh(described.described_devices(cards.load_card("h100"), per_host=2))
    experiment, _ = plan.for_device_memory(experiment, device_limits.limit_of(mesh))
    program = assemble(plan.with_open_data(experiment, mesh), mesh)
    try:
        text = program.train_step.lower(*abstract_args(program)).as_text()
    finally:
        program.close()
    assert "mhlo.num_partitions = 2" in text and not [one for one in HOST if one in text]


@needs_compiler
@pytest.mark.full("tests/plan/test_gpu_goldens.py::test_command_prints_the_program_of_an_h100")
def test_search_and_nearest_change_compile_for_the_card(capsys, monkeypatch):
    module = importlib.import_module("jaxtrain.plan.search")
    monkeypatch.setattr(module, "MOST", 3)
    found = plan_for(capsys, TINY, "--for", "l40s", "--devices", "2", "--search")["search"]
    assert [tuple(one["mesh"].values()) for one in found["found"]] == [(2, 1, 1), (1, 2, 1)]
    assert all(one["fits"] for one in found["found"])
    assert "no parameter" in found["impossible"][0]["reason"]  # of this model is split over `model`

    found = plan_for(capsys, "digits_cnn", "--for", "h100", "--device-memory", "4MB")
    assert found["fits"] is False and found["limit"]["bytes"] == 3_000_000
    assert found["change"]["flags"] and found["change"]["total"] <= 3_000_000


def test_products_are_those_of_cublas_where_triton_has_no_tiles(monkeypatch):
    module = importlib.import_module("jaxtrain.plan.measure")
    asked = []

    def compile_with_graphs(lowered, options=None):
        asked.append(options)
        if not options:
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: Couldn't find output tile sizes that satisfy hlo: ..."
            )
        return "compiled", None

    monkeypatch.setattr(module, "compile_with_graphs", compile_with_graphs)
    compiled, _, notes = module._compile_for_card("lowered")
    assert compiled == "compiled" and asked == [None, {"xla_gpu_enable_triton_gemm": False}]
    assert notes == ("matrix products are cuBLAS's: XLA finds no tiles for Triton without a GPU",)


@needs_compiler
def test_data_larger_than_a_small_card_are_refused_with_their_sizes(capsys, tmp_path):
    text = (
        (ROOT / "jaxtrain" / "sharding" / "cards.toml")
        .read_text()
        .partition("[h200]")[0]
        .partition("[h100]")[2]
    )
    path = tmp_path / "small.toml"
    path.write_text(text.replace("84_942_979_072", "4_000"))
    assert commands.main(["plan", "--experiment", TINY, "--for", str(path)]) == 2
    assert "13.60 KB of examples on each device, which has 3.00 KB: use" in capsys.readouterr().err
