"""jaxtrain.plan: bytes against the arrays of a real run, FLOPs against counts by hand, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT

from jaxtrain import __main__ as commands
from jaxtrain import data, losses, models, optim, plan, sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import size_text
from jaxtrain.experiment import Experiment
from jaxtrain.monitor.console import Plain
from jaxtrain.plan import measure, mesh_warnings
from jaxtrain.program import abstract_state, assemble, device_limits, flops, memory_text
from jaxtrain.program.memory import abstract_batch, bytes_per_device, device_arrays
from jaxtrain.train import loop, out_of_memory

TINY = str(Path(__file__).parents[1] / "tiny.py")
RNG = np.random.default_rng(0)
IMAGES = data.Arrays(
    {"image": RNG.integers(0, 256, (96, 8, 8, 1)).astype(np.uint8), "label": RNG.integers(0, 4, 96)}
)
MLP = Experiment(
    model=models.MLP(widths=(128, 64), classes=4),
    train=IMAGES,
    test=data.Subset(IMAGES, np.arange(40)),
    loss=losses.CrossEntropy(),
    optimizer=optim.AdamW(lr=1e-3),
    preprocess=(data.Normalise(),),
    post_update=(optim.EMA(decay=0.9),),
    batch=32,
    epochs=1,
)
TEXT = RNG.integers(0, 64, (32, 65)).astype(np.uint8)
GPT = dataclasses.replace(
    MLP,
    model=models.GPT(vocab=64, context=64, width=128, depth=2, heads=4, dropout=0.0),
    train=data.Arrays({"tokens": TEXT[:, :-1], "label": TEXT[:, 1:].astype(np.int32)}),
    test=data.Arrays({"tokens": TEXT[:, :-1], "label": TEXT[:, 1:].astype(np.int32)}),
    preprocess=(),
    post_update=(),
    batch=16,
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


def mesh_of_text(text: str, devices: int = 8):
    return sharding.make_mesh(jax.devices()[:devices], sharding.parse_mesh(text, devices))


def on_first_device(tree) -> int:
    """Bytes of the arrays of ``tree`` on device 0."""
    first = jax.devices()[0]
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)
    return sum(shard.data.nbytes for shard in shards)


@pytest.mark.full("[fsdp=8-8]")
@pytest.mark.parametrize(
    ("mesh", "devices"), [("data=1", 1), ("data=8", 8), ("fsdp=8", 8), ("data=2,fsdp=2,model=2", 8)]
)
def test_bytes_match_the_arrays_of_a_real_run(mesh, devices):
    for placement in ("device", "stream"):
        program = assemble(
            dataclasses.replace(MLP, placement=placement, holdout=16), mesh_of_text(mesh, devices)
        )
        parts = {name: sum(one.bytes for one in arrays) for name, arrays in device_arrays(program).items()}
        batch = jax.device_put(program.train.batch(0), batch_shardings(program))
        rows = {name: x for name, x in batch.items() if name != "data"}
        resident = [s.loader.batch(0)["data"] for s in program.evals.values() if placement == "device"]
        assert parts["batch"] == on_first_device(rows) > 0
        assert parts["data"] == on_first_device([batch.get("data", {}), *resident])
        assert (parts["data"] > 0) == (placement == "device")
        program.close()
    state = program.init()
    assert parts["params"] == on_first_device(state.params)
    assert parts["optimizer"] == on_first_device(state.opt_state)
    assert parts["other_state"] == on_first_device([state.step, state.extra])


def batch_shardings(program):
    return jax.tree.map(lambda x: x.sharding, abstract_batch(program))


@pytest.mark.full("tests/plan/test_plan.py::test_bytes_match_the_arrays_of_a_real_run")
def test_fsdp_divides_a_gpt_of_ten_million_parameters_by_its_devices():
    exp = dataclasses.replace(GPT, model=models.GPT(vocab=256, context=64, width=384, depth=6, heads=6))
    replicated, sharded = (
        abstract_state(exp, mesh_of_text(mesh), GPT.train.gather(np.zeros(1, np.int64)))
        for mesh in ("data=8", "fsdp=8")
    )
    assert sum(x.size for x in jax.tree.leaves(replicated.params)) >= 10**7

    def each(state) -> int:
        return sum(map(bytes_per_device, jax.tree.leaves((state.params, state.opt_state))))

    assert each(sharded) <= 1.05 * each(replicated) / 8
    assert each(replicated) >= 3 * 4 * 10**7  # Adam has two moments


@pytest.mark.full("tests/plan/test_plan.py::test_json_is_complete_and_agrees_with_the_table")
def test_temporaries_match_the_compiled_step_of_a_run():
    program = assemble(MLP, mesh_of_text("data=8"))
    found = measure(program)
    step = program.train_step.lower(program.abstract_state, program.train.batch(0), program.key).compile()
    stats = step.memory_analysis()
    assert found.bytes["temporaries"] == stats.temp_size_in_bytes > 0
    assert found.bytes["outputs"] == stats.output_size_in_bytes - stats.alias_size_in_bytes > 0
    data_of_test = sum(
        one.bytes for one in device_arrays(program)["data"] if one.path.startswith("data/test")
    )
    taken = found.persistent - found.bytes["prefetched_batches"] - data_of_test
    assert stats.argument_size_in_bytes == taken  # the key is not used
    assert found.total == sum(found.bytes.values())
    assert found.bytes["prefetched_batches"] == 2 * found.bytes["batch"]
    assert [(one.kind, one.axes) for one in found.collectives] == [("all-reduce", ("data",))]
    gradients = sum(x.size for x in jax.tree.leaves(program.abstract_state.params)) * 4
    assert gradients == found.parameters * 4
    assert gradients <= found.collectives[0].bytes < gradients + 100  # and the metrics


@pytest.mark.full("tests/plan/test_plan.py::test_json_is_complete_and_agrees_with_the_table")
def test_largest_arrays_have_their_sharding_and_bytes_per_device(mesh8):
    found = measure(assemble(MLP, mesh_of_text("fsdp=8")), count=False).largest
    assert len(found) == 10 and [one.bytes for one in found] == sorted((o.bytes for o in found), reverse=True)
    kernel = next(one for one in found if one.path == "params/dense1/kernel")
    assert (kernel.array, kernel.sharding, kernel.bytes) == ("float32[128,64]", "fsdp", 128 * 64 * 4 // 8)
    image = next(one for one in found if one.path == "data/train/image")
    assert (image.array, image.sharding, image.bytes) == ("uint8[96,8,8,1]", "", 96 * 64)


def dense(widths, batch) -> int:
    """Forward and backward; the first layer needs no gradient of its input."""
    pairs = list(itertools.pairwise(widths))
    return 2 * batch * (3 * sum(a * b for a, b in pairs) - pairs[0][0] * pairs[0][1])


@pytest.mark.full("tests/plan/test_plan.py::test_flops_of_a_gpt_are_six_per_parameter_and_token")
@pytest.mark.parametrize("change", [{}, {"accumulate": 4, "remat": "nothing_saveable"}])
def test_flops_of_an_mlp(change):
    image = data.Arrays({"image": np.zeros((64, 16, 16, 4), np.uint8), "label": np.zeros(64, np.int32)})
    exp = dataclasses.replace(
        MLP, model=models.MLP(widths=(512, 256), classes=8), train=image, test=image, batch=64,
        post_update=(),
        optimizer=optim.SGD(lr=0.1), **change,
    )  # fmt: skip
    hand = dense((1024, 512, 256, 8), 64)
    for mesh, devices in (("data=1", 1), ("fsdp=8", 8)):
        assert flops.model_flops(assemble(exp, mesh_of_text(mesh, devices))) == pytest.approx(hand, rel=0.04)


@pytest.mark.full("tests/plan/test_plan.py::test_json_is_complete_and_agrees_with_the_table")
def test_mesh_that_moves_more_than_it_computes_is_noted(monkeypatch):
    program = assemble(MLP, mesh_of_text("data=8"))
    monkeypatch.setattr(mesh_warnings, "MIN_SECONDS", 0.0)  # its collectives take microseconds
    [note] = [note for note in measure(program).notes if "moves" in note]
    assert note.startswith("data moves ") and note.endswith("try a larger batch, or fewer devices")
    program.close()


def test_flops_of_a_gpt_are_six_per_parameter_and_token():
    exp = dataclasses.replace(GPT, model=dataclasses.replace(GPT.model, width=256, depth=3))
    program = assemble(exp, mesh_of_text("data=2,fsdp=2,model=2"))
    params = sum(x.size for x in jax.tree.leaves(program.abstract_state.params))
    tokens = 16 * 64
    attention = 12 * 3 * 64 * 256 * tokens
    assert flops.model_flops(program) == pytest.approx(6 * params * tokens + attention, rel=0.03)


def test_flops_of_loops_count_every_iteration():
    def steps(unroll):
        def loss(w, x):
            return jax.lax.scan(lambda c, _: (jax.numpy.tanh(c @ w), None), x, length=10, unroll=unroll)[
                0
            ].sum()

        return jax.jit(jax.grad(loss)).trace(np.ones((64, 64), np.float32), np.ones((32, 64), np.float32))

    hand = 10 * 3 * 2 * 32 * 64 * 64
    assert steps(1).lower().cost_analysis()["flops"] < 0.2 * hand  # XLA's own count
    for unroll in (1, 3, 4, 10):
        assert flops.flops_of(steps(unroll)) == pytest.approx(hand, rel=0.03)

    def nested(x):
        inner = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]  # noqa: E731
        return jax.lax.scan(lambda x, _: (inner(x), None), x, length=5)[0]

    assert flops.flops_of(jax.jit(nested).trace(np.ones((10, 10), np.float32))) == 35 * 2000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512 MiB", 2**29),
        ("16gb", 16 * 10**9),
        (".5TB", 5 * 10**11),
    ],
)
def test_parse_size_units(text, size):
    assert device_limits.parse_size(text, "--device-memory") == size


@pytest.mark.parametrize("text", ["80", "80G", "GB", "-1GB", "0GB", "1e9", "80 gigabytes", ""])
def test_invalid_size_is_refused(text, capsys):
    with pytest.raises(InputError, match="--device-memory"):
        device_limits.parse_size(text, "--device-memory")
    code, error = (
        commands.main(["plan", "--experiment", TINY, f"--device-memory={text}"]),
        capsys.readouterr().err,
    )
    assert code == 2 and error.count("\n") == 1
    if text == "80":
        assert "has no unit: use 80GB or 80GiB" in error


@pytest.mark.parametrize("name", [None, "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_limit_is_the_fraction_that_jax_allocates(name, monkeypatch, mesh1):
    if name:
        monkeypatch.setenv(name, ".9")
    limit = device_limits.limit_of(mesh1, "80GB")
    assert limit.bytes == (72 if name else 60) * 10**9
    assert (f"90 % of 80GB, set by {name}" if name else "75 % of 80GB") in limit.text
    assert device_limits.limit_of(mesh1) is None  # a CPU
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "lots")
    with pytest.raises(InputError, match="XLA_CLIENT_MEM_FRACTION=lots"):
        device_limits.limit_of(mesh1, "80GB")


def test_device_memory_decides_which_splits_are_resident(mesh1):
    """At most a tenth of it per split, as in ``program.splits``."""
    size = 96 * (64 + 4)  # label: int64 here, int32 on a device
    source = data.Synthetic(n=96, shape=(8, 8, 1), classes=4)
    exp = dataclasses.replace(MLP, train=source, test=data.Synthetic(n=20, shape=(8, 8, 1), classes=4))
    for memory, placement, expected in [
        (20 * size, "device", {"train": True, "test": True}),
        (9 * size, "stream", {"train": False, "test": True}),
        (size, "stream", {"train": False, "test": False}),
    ]:
        changed, resident = plan.for_device_memory(exp, device_limits.Limit(memory, ""))
        assert (changed.placement, resident) == (placement, expected)
        program = assemble(plan.with_open_data(changed, mesh1), mesh1)
        arrays = device_arrays(program, resident)["data"]
        assert {one.path.split("/")[1] for one in arrays} == {name for name in expected if expected[name]}
        assert sum(one.bytes for one in arrays) == 68 * (96 * expected["train"] + 20 * expected["test"])
        program.close()
    assert plan.for_device_memory(exp, None) == (exp, None)
    streamed = dataclasses.replace(exp, placement="stream")
    assert plan.for_device_memory(streamed, device_limits.Limit(10**9, "")) == (streamed, None)
    held_out = dataclasses.replace(exp, holdout=90)  # six examples remain
    assert plan.for_device_memory(held_out, device_limits.Limit(9 * size, ""))[1] == {
        "train": True,
        "test": True,
        "valid": False,
    }


@pytest.fixture
def mlp(tmp_path) -> str:
    """An experiment in a file, which compiles faster than the CNN of ``tiny``."""
    path = tmp_path / "mlp.py"
    path.write_text(
        "from jaxtrain import data, losses, models, optim\n"
        "from jaxtrain.experiment import Experiment\n"
        "TRAIN = data.Synthetic(n=200, shape=(8, 8, 1), classes=4)\n"
        "EXPERIMENT = Experiment(model=models.MLP(widths=(128, 64), classes=4), train=TRAIN, test=TRAIN,"
        " loss=losses.CrossEntropy(), optimizer=optim.Adam(lr=1e-3), preprocess=(data.Normalise(),),"
        " post_update=(optim.EMA(decay=0.9),), batch=16, epochs=1)\n"
    )
    return str(path)


def plan_json(capsys, *args) -> dict:
    assert commands.main(["plan", "--json", "--experiment", *args]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.full("tests/plan/test_plan.py::test_json_is_complete_and_agrees_with_the_table")
def test_output_of_a_model_does_not_corrupt_json(mlp, capsys):
    with Path(mlp).open("a") as file:
        file.write(
            "import dataclasses\n"
            "def loud(batch, key):\n"
            "    print('loud')\n"
            "    return batch\n"
            "EXPERIMENT = dataclasses.replace(EXPERIMENT, augment=(loud,))\n"
        )
    assert commands.main(["plan", "--json", "--experiment", mlp, "--devices", "1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["experiment"] == "mlp" and "loud" in captured.err


def test_json_is_complete_and_agrees_with_the_table(mlp, capsys):
    found = plan_json(capsys, mlp, "--mesh", "fsdp=8", "--device-memory", "1GB")
    assert found["experiment"] == "mlp" and found["mesh"] == {"data": 1, "fsdp": 8, "model": 1}
    assert found["devices"] == {"count": 8, "kind": "cpu", "simulated": False}
    sizes = found["bytes_per_device"]
    assert sizes.pop("total") == sum(sizes.values()) and set(sizes) == set(memory_text.NAMES)
    assert found["fits"] is True and found["limit"]["bytes"] == 750_000_000
    assert found["flops"]["example"] * 16 == found["flops"]["step"] > 1e6
    assert found["parameters"] > 1000 and found["resident"] == ["train", "test"] and found["steps"] == 13
    assert found["collectives"][0].keys() == {"kind", "axes", "bytes", "count"}
    assert len(found["largest"]) == 10 and found["compiled_for"] == "cpu"
    assert (found["batch"], found["accumulate"], found["remat"], found["precision"]) == (
        16,
        1,
        "none",
        "float32",
    )

    assert commands.main(["plan", "--experiment", mlp, "--mesh", "fsdp=8", "--device-memory", "1GB"]) == 0
    out = capsys.readouterr().out
    shown = (ROOT / "docs" / "parallelism.md").read_text().partition("```text\n")[2].partition("```")[0]
    titles = re.findall(r"^[a-z][a-z ]+$|^  [a-z]+ ?[a-z]+(?=  )", shown, re.M)  # of sections and rows
    assert len(titles) > 12 and all(title in out for title in titles if "prefetched" not in title), titles
    assert re.search(r"^mlp on 8 × cpu \(fsdp=8\), batch 16, 13 steps$", out, re.M)
    for part, name in memory_text.NAMES.items():
        if sizes[part]:
            assert re.search(rf"^  {name} +{re.escape(size_text(sizes[part]))} ", out, re.M), name
    assert "XLA's figure, compiled for CPU: a GPU's will differ" in out
    assert re.search(r"^verdict: fits: [\d.]+ KB of 750.00 MB \(0 %\)", out, re.M)
    assert "75 % of 1GB" in out and "tried" not in out
    assert max(map(len, out.splitlines())) < 100


@pytest.mark.full("tests/plan/test_plan.py::test_json_is_complete_and_agrees_with_the_table")
def test_without_a_limit_there_is_no_verdict(mlp, capsys):
    found = plan_json(capsys, mlp, "--devices", "1")
    assert found["fits"] is None and found["limit"] is None and found["collectives"] == []
    assert commands.main(["plan", "--experiment", mlp, "--devices", "1"]) == 0
    assert "give one, such as --device-memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--experiment", "digit_cnn"], "did you mean digits_cnn?"),
        (["--experiment", TINY, "--set", "batsh=1"], "did you mean batch?"),
        (["--experiment", TINY, "--devices", "5000"], "plan simulates at most 1024"),
        (["--experiment", TINY, "--devices", "0"], "--devices 0: give at least 1"),
        (["--experiment", TINY, "--mesh", "fsdp=4"], "leaves 4 idle"),
        (["--experiment", TINY, "--mesh", "date=8"], "did you mean data?"),
        (["--experiment", TINY, "--set", "batch=12"], "batch 12 does not divide over 8 devices"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, message, capsys):
    code, error = commands.main(["plan", *args]), capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.full("tests/plan/test_plan.py")
def test_missing_devices_are_simulated(mlp, python):
    done = python("-m", "jaxtrain", "plan", "--experiment", mlp, "--mesh", "data=2,fsdp=2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == {"count": 4, "kind": "cpu", "simulated": True}
    assert found["mesh"] == {"data": 2, "fsdp": 2, "model": 1}
    assert any("4 CPU devices stand for" in note for note in found["notes"])


def exhaust(*args):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
    )


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_out_of_memory_lists_live_arrays_and_advice(placement, tmp_path, capsys, monkeypatch):
    program = assemble(dataclasses.replace(MLP, placement=placement), mesh_of_text("fsdp=8"))

    def step(*args):
        monkeypatch.setattr(jax, "device_put", None)  # nothing may be placed on a device from here on
        monkeypatch.setattr(program.train, "close", lambda: None)
        exhaust()

    step.trace = program.train_step.trace
    monkeypatch.setattr(out_of_memory, "LARGEST", 1000)  # other tests may have left arrays
    record = {"name": "digits_cnn", "config": {}, "origin": "mine/digits_cnn.py", "overrides": ["batch=32"]}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunError) as raised:
        loop.fit(dataclasses.replace(program, train_step=step), tmp_path, Plain(), "digits_cnn")
    assert str(raised.value) == (
        "a device has no memory left, which was asked for 17.18 GB more: "
        "try --set accumulate=2 or --set batch=16, or see what fits with: "
        "python -m jaxtrain plan --experiment mine/digits_cnn.py --set batch=32 --devices 8 --mesh fsdp=8"
    )
    out = capsys.readouterr().out
    exact = {name: sum(one.bytes for one in arrays) for name, arrays in device_arrays(program).items()}
    assert re.search(rf"^  parameters +{size_text(exact['params'])} ", out, re.M)
    assert re.search(rf"^  total +{size_text(sum(exact.values()))} ", out, re.M)
    assert re.search(
        r"^  (params|opt_state|extra)/\S*dense1/kernel and 3 like it +[4-9] × +float32\[128,64\] fsdp",
        out,
        re.M,
    )
    monkeypatch.undo()
    program.close()


def test_other_device_errors_pass_through(tmp_path, mesh1):
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        out_of_memory.explain_out_of_memory(assemble(MLP, mesh1), "mlp", tmp_path, Plain()),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_out_of_memory_advice_survives_failing_reports(tmp_path, mesh1, capsys, monkeypatch):
    program = assemble(MLP, mesh1)
    explain = out_of_memory.explain_out_of_memory(program, "mlp", tmp_path, Plain())
    for name in ("device_arrays", "live_arrays", "mesh_of"):
        monkeypatch.setattr(out_of_memory, name, exhaust)
    with pytest.raises(RunError, match=r"jaxtrain plan --experiment mlp$"), explain:
        exhaust()
    assert capsys.readouterr().out == ""


def test_live_arrays_outside_the_state_are_other(mesh1):
    state = assemble(MLP, mesh1).abstract_state
    mine = jax.device_put(np.ones((128, 64), np.float32), sharding.replicated(mesh1))
    unknown = jax.device_put(np.ones((333, 7), np.float32), sharding.replicated(mesh1))
    rows = {text: (where, count) for where, count, text, _ in out_of_memory.live_arrays(state)}
    assert rows["float32[333,7]"] == ("other", 1)
    assert rows["float32[128,64]"][0].endswith("dense1/kernel and 3 like it")
    assert mine.shape != unknown.shape
