"""jaxtrain.experiment.overrides: typed overrides, the config as text, and its hash."""

from __future__ import annotations

import dataclasses
import enum
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import data, losses, metrics, models, optim, sharding
from jaxtrain.compress import Prune
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import (
    Experiment,
    comparable_configs,
    config_hash,
    config_text,
    first_difference,
    override,
)

SOURCE = data.Synthetic(n=64, shape=(4, 4, 1))
BASE = Experiment(
    model=models.CNN(widths=(32, 64)),
    train=SOURCE,
    test=data.Synthetic(n=32, shape=(4, 4, 1), split="test"),
    loss=losses.CrossEntropy(smoothing=0.1),
    optimizer=optim.SGD(lr=optim.OneCycle(peak=0.4), momentum=0.9),
    augment=(data.Flip(), data.Crop(pad=2)),
    preprocess=(data.Normalise(),),
    batch=8,
    epochs=20,
)


def at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch=64", 64),
        ("epochs=3", 3.0),
        ("epochs=0.5", 0.5),
        ("epochs=1e1", 10.0),
        ("seed=7", 7),
        ("optimizer.nesterov=true", True),
        ("optimizer.nesterov=True", True),
        ("optimizer.nesterov=FALSE", False),
        ("model.batch_norm=false", False),
        ("eval_every=none", None),
        ("eval_every=None", None),
        ("eval_every=2", 2.0),
        ("eval_batch=16", 16),
        ("optimizer.clip=1", 1.0),
        ("model.widths=64,128", (64, 128)),
        ("model.widths=(64,128)", (64, 128)),
        ("model.widths=(64, 128)", (64, 128)),
        ("model.widths=[64]", (64,)),
        ("model.widths=64", (64,)),
        ("model.widths=()", ()),
        ("model.activation=gelu", "gelu"),
        ("drop_remainder=True", True),
        ("accumulate=4", 4),
        ("precision=float16", "float16"),
        ("remat=nothing_saveable", "nothing_saveable"),
        ("placement='stream'", "stream"),
        ("select=-loss", "-loss"),
        ("optimizer.decay=norm/|=", "norm/|="),
        ("optimizer.decay=5", "5"),
        ("optimizer.decay=none", "none"),
        ("optimizer.decay=", ""),
        ("augment.0.p=0.25", 0.25),
        ("augment.1.mode=reflect", "reflect"),
        ("preprocess.0.mean=0.1,0.2,0.3", (0.1, 0.2, 0.3)),
        ("optimizer.lr=0.2", 0.2),
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr.peak=0.3", 0.3),
        ("train.n=128", 128),
        ("train.split=test", "test"),
        ("eval_every=none", None),
        ("holdout=0.1", 0.1),
        ("holdout=10", 10.0),
    ],
)
def test_override_is_typed_by_the_field_it_names(setting: str, value: Any) -> None:
    path = setting.partition("=")[0]
    changed = override(BASE, [setting])
    found = at(changed, path)
    assert found == value and type(found) is type(value)
    others = [k for k, v in config_text(changed).items() if v != config_text(BASE).get(k)]
    assert all(other == path or other.startswith(path + ".") for other in others), "nothing else changes"


def test_overrides_apply_in_order_and_leave_the_original_alone() -> None:
    before = config_text(BASE)
    changed = override(BASE, ["batch=16", "batch=32", "optimizer.lr.peak=0.1", "optimizer.lr.end=0.5"])
    assert (changed.batch, changed.optimizer.lr) == (32, optim.OneCycle(peak=0.1, end=0.5))
    assert config_text(BASE) == before
    assert override(BASE, []) is BASE


def test_fields_of_one_object_are_set_together() -> None:
    """Each of these alone would be refused: only the new start and end must fit each other."""
    staged = dataclasses.replace(BASE, post_update=(Prune(start=0.1, end=0.2),))
    for order in (1, -1):
        settings = ["post_update.0.start=0.7", "post_update.0.end=0.9"][::order]
        (stage,) = override(staged, settings).post_update
        assert (stage.start, stage.end) == (0.7, 0.9)
    with pytest.raises(InputError, match=r"prune.start is 0.9 and prune.end 0.7"):
        override(staged, ["post_update.0.start=0.9", "post_update.0.end=0.8", "post_update.0.end=0.7"])
    assert override(staged, ["post_update.0.start=0.15", "post_update=()"]).post_update == ()
    with pytest.raises(InputError, match=r"post_update.0 is unknown"):
        override(staged, ["post_update=()", "post_update.0.start=0.15"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch", "write path=value"),
        ("=3", "write path=value"),
        ("bacth=3", "bacth is unknown: did you mean batch?"),
        ("optimiser.lr=1", "did you mean optimizer?"),
        ("optimizer.momentun=1", "did you mean optimizer.momentum?"),
        ("optimizer.lr.paek=1", "did you mean optimizer.lr.peak?"),
        ("model.width=3", "did you mean model.widths?"),
        ("model.parent=3", "model.parent is unknown"),
        ("model.name=net", "model.name is unknown"),
        ("augment.2.p=1", "augment.2 is unknown: there are 0, 1"),
        ("augment.0.zzzzz=1", "there are p"),
        ("batch.size=3", "batch.size is unknown: batch is 8, which has no fields"),
        ("valid.n=9", "valid is None, which has no fields"),
        ("batch=0.5", "batch=0.5: expected int, such as 8"),
        ("batch=many", "batch=many: expected int"),
        ("batch=none", "expected int"),
        ("batch=true", "expected int"),
        ("batch=8,8", "expected int"),
        ("epochs=long", "expected float, such as 20"),
        ("optimizer.nesterov=1", "expected bool, such as False"),
        ("optimizer.nesterov=yes", "expected bool"),
        ("optimizer.clip=x", "expected float or None"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected float"),
        ("model.widths=64,x", "expected tuple"),
        ("model.widths=0.5", "expected tuple"),
        ("drop_remainder=cut", "expected bool, such as False"),
        ("train=cifar10", r"train is Synthetic and cannot be set from text: .*\(n, shape,"),
        ("loss=mse", "loss is CrossEntropy and cannot be set from text"),
        ("augment=flip", r"augment is \(Flip, Crop\) and cannot be set from text: .*\(0, 1\)"),
        ("augment.0=flip", "augment.0 is Flip: set one of its fields"),
        ("loss.smoothing=2", r"loss.smoothing is 2.0: it must be in \[0, 1\)"),
        ("batch=0", "batch is 0: it must be at least 1"),
        ("accumulate=0", "accumulate is 0: it must be at least 1"),
        ("accumulate=0.5", "accumulate=0.5: expected int, such as 1"),
        ("precision=float8", "expected 'float32' or 'bfloat16' or 'float16', such as"),
        ("remat=all", "expected 'none' or 'nothing_saveable' or .* such as 'none'"),
        ("epochs=1e999", "epochs"),
        ("batch=10000000000", r"batch is 10000000000: it must be below 2\*\*31"),
        ("eval_batch=1" + "0" * 30, r"eval_batch is 10{30}: it must be below 2\*\*31"),
        ("seed=" + "(" * 300, "seed="),
    ],
)
def test_setting_that_cannot_be_applied_is_refused_in_one_line(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        override(BASE, [setting])
    assert "\n" not in str(raised.value)


def test_setting_one_item_of_a_plain_tuple_is_refused_with_advice() -> None:
    with pytest.raises(InputError, match=r"model\.widths=") as raised:
        override(BASE, ["model.widths.0=64"])
    assert "set one of its fields" not in str(raised.value), "an int has none"


def test_field_without_a_usable_annotation_keeps_the_type_of_its_value() -> None:
    @dataclasses.dataclass(frozen=True)
    class Loose:
        rate: Any = 0.5
        depth: "Unseen" = 3  # type: ignore[name-defined] # noqa: F821, UP037

    assert override(Loose(), ["rate=2", "depth=4"]) == Loose(rate=2.0, depth=4)
    with pytest.raises(InputError, match="expected int"):
        override(Loose(), ["depth=deep"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0: it must be at least 1"),
        ({"accumulate": 2.0}, "accumulate is 2.0: it must be an int"),
        ({"precision": "float8"}, "precision is 'float8': it must be one of float32, bfloat16, float16"),
        (
            {"remat": None},
            "remat is None: it must be one of none, nothing_saveable, dots_saveable, dots_with",
        ),
    ],
)
def test_experiment_refuses_settings_its_step_does_not_support(changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(BASE, **changes)


# --- the config as text


def scaled(outputs: Any, batch: Any, scale: float = 1.0) -> Any:
    return scale * outputs.mean(), {}


WITH_FUNCTIONS = dataclasses.replace(
    BASE,
    loss=scaled,
    model=models.as_model(models.MLP()),
    augment=(data.Flip(), lambda batch, key: batch),
    data_init=lambda params, batch: params,
    step_factory=scaled,
)


@pytest.mark.parametrize("experiment", [BASE, WITH_FUNCTIONS], ids=["plain", "functions"])
def test_text_has_every_setting_and_no_address(experiment: Experiment) -> None:
    text = config_text(dataclasses.replace(experiment, compress="int8"))  # absent at its default
    assert "0x" not in repr(text)
    assert all("\n" not in value for value in text.values())
    names = {path.partition(".")[0] for path in text}
    assert names == {field.name for field in dataclasses.fields(Experiment)}


def test_text_names_settings_by_their_paths() -> None:
    text = config_text(BASE)
    wanted = {
        "batch": "8",
        "epochs": "20",
        "model": "CNN",
        "model.widths": "(32, 64)",
        "optimizer": "SGD",
        "optimizer.lr": "OneCycle",
        "optimizer.lr.peak": "0.4",
        "optimizer.clip": "None",
        "augment.1": "Crop",
        "augment.1.pad": "2",
        "loss.label": "'label'",
        "drop_remainder": "False",
    }
    assert {path: text[path] for path in wanted} == wanted
    assert not any(path.endswith((".parent", ".name")) for path in text)


def test_text_of_an_array_is_a_checksum_of_every_byte() -> None:
    image = np.arange(8, dtype=np.uint8).reshape(2, 4)
    found = config_text(data.Arrays({"image": image}))
    assert found == {"fields.image": "uint8[2, 4] crc32 88aa689f"}
    other = image.copy()
    other[1, 3] += 1
    for changed in (other, image.astype(np.int8), image.reshape(4, 2), image[::-1]):
        assert config_text(data.Arrays({"image": changed})) != found
    assert config_text(data.Arrays({"image": np.asfortranarray(image)})) == found


PROGRAM = """
import pathlib
import sys

from jaxtrain.experiment import config_hash, config_text
from jaxtrain.core.user_modules import load

experiment = load(sys.argv[1]).EXPERIMENT
print(config_hash(experiment), sorted(config_text(experiment).items()))
"""


@pytest.mark.full("tests/experiment/test_config.py")
def test_text_and_hash_are_the_same_in_every_process(python: Any, tmp_path: Path) -> None:
    tiny = (Path(__file__).parents[1] / "tiny.py").read_text()
    (tmp_path / "tiny.py").write_text(
        tiny.replace("post_update=", "data_init=lambda p, b: p,\n    post_update=")
    )
    (tmp_path / "program.py").write_text(PROGRAM)
    runs = [python(tmp_path / "program.py", tmp_path / "tiny.py", PYTHONHASHSEED=seed) for seed in ("1", "2")]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert "data_init" in runs[0].stdout and "crc32" in runs[0].stdout


# --- the hash

CASES: dict[str, Any] = {
    "model": models.MLP(),
    "train": dataclasses.replace(SOURCE, n=65),
    "test": dataclasses.replace(SOURCE, n=65),
    "loss": losses.CrossEntropy(),
    "optimizer": optim.SGD(lr=optim.OneCycle(peak=0.4)),
    "batch": 16,
    "epochs": 21,
    "valid": SOURCE,
    "holdout": 0.1,
    "augment": (data.Flip(),),
    "preprocess": (),
    "post_update": (optim.EMA(),),
    "accumulate": 2,
    "precision": "bfloat16",
    "grad_reduce_dtype": "compute",
    "remat": "dots_saveable",
    "seed": 1,
    "drop_remainder": True,
    "eval_batch": 16,
    "eval_every": None,
    "select": "-loss",
    "data_init": scaled,
    "step_factory": scaled,
    "guard": "skip",
    "compress": "int8",
    "steps_per_execution": 4,
    "max_loss_spike": 3.0,
    "placement": "stream",
    "workers": 2,
    "log_every": 7,
    "save_every": 2.0,
    "max_to_keep": 3,
    "max_in_flight": 3,
    "report": metrics.Regression(),
    "rules": (sharding.Rule("vocab", None),),
}
NOT_HASHED = {
    "seed",
    "workers",
    "log_every",
    "save_every",
    "max_to_keep",
    "max_in_flight",
    "report",
    "rules",
    "max_loss_spike",
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Experiment)])
def test_hash_ignores_only_the_seed_and_operational_settings(field: str) -> None:
    changed = dataclasses.replace(BASE, **{field: CASES[field]})
    assert config_text(changed) != config_text(BASE), "the config text records everything"
    assert (config_hash(changed) == config_hash(BASE)) == (field in NOT_HASHED)


def test_a_task_is_not_hashed_and_a_recorded_report_does_not_decide() -> None:
    reported = dataclasses.replace(BASE, report=metrics.Binary())
    other = dataclasses.replace(BASE, loss=losses.CrossEntropy(smoothing=0.1, task="segmentation"))
    assert config_hash(other) == config_hash(BASE)
    for before, now in ((reported, BASE), (BASE, reported), (other, BASE)):
        assert first_difference(*comparable_configs(config_text(before), now)) is None
    changed = override(reported, ["loss.ignore=3"])
    assert first_difference(*comparable_configs(config_text(BASE), changed)) == ("loss.ignore", "None", "3")


@pytest.mark.parametrize(
    "setting",
    ["optimizer.lr.end=0.5", "model.dropout=0.5", "augment.1.pad=3", "train.seed=5", "preprocess.0.scale=1"],
)
def test_hash_depends_on_nested_settings(setting: str) -> None:
    assert config_hash(override(BASE, [setting])) != config_hash(BASE)


def test_hash_depends_on_the_seed_of_a_part() -> None:
    assert config_hash(override(BASE, ["seed=5"])) == config_hash(BASE)
    assert config_hash(override(BASE, ["test.seed=5"])) != config_hash(BASE)


def test_integral_floats_and_integers_have_the_same_hash() -> None:
    assert config_hash(dataclasses.replace(BASE, epochs=20.0)) == config_hash(BASE)
    assert config_hash(dataclasses.replace(BASE, epochs=20.5)) != config_hash(BASE)


def test_hash_depends_on_the_order_of_stages() -> None:
    swapped = dataclasses.replace(BASE, augment=BASE.augment[::-1])
    assert config_hash(swapped) != config_hash(BASE)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Holder:
    value: Any


DIFFERENT = {
    "floats": (0.1, 0.2),
    "tuples": ((1, 2), (1, 3)),
    "text and number": ("1", 1),
    "absent and text": (None, "None"),
    "classes": (jnp.float32, jnp.bfloat16),
    "types": (np.dtype("float32"), np.dtype("int8")),
    "NumPy integers": (np.int64(3), np.int64(4)),
    "NumPy floats": (np.float32(0.1), np.float32(0.2)),
    "JAX arrays": (jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])),
    "paths": (Path("a"), Path("b")),
    "enumerations": (Colour.RED, Colour.BLUE),
    "bytes": (b"a", b"b"),
    "sets": (frozenset({1}), frozenset({2})),
    "partial functions": (functools.partial(scaled, scale=1.0), functools.partial(scaled, scale=2.0)),
    "nested stages": (((data.Flip(),),), ((data.Flip(p=0.9),),)),
    "dictionaries": ({"a": 1}, {"a": 2}),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_values_have_different_text(kind: str) -> None:
    one, other = (config_text(Holder(value)) for value in DIFFERENT[kind])
    assert one != other
    assert "0x" not in repr((one, other))


@pytest.mark.parametrize(("number", "same"), [(np.int64(20), 20), (np.float64(0.5), 0.5)])
def test_numpy_scalar_has_the_text_of_its_number(number: Any, same: Any) -> None:
    assert config_text(Holder(number)) == config_text(Holder(same))


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({"a": "1"}, {"a": "1"}, None),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, ("b", "2", "3")),
        ({"a": "1"}, {"a": "1", "b": "3"}, ("b", "absent", "3")),
        ({"a": "1", "b": "2"}, {"a": "1"}, ("b", "2", "absent")),
        ({"a": "1", "b": "2"}, {"b": "3", "a": "2"}, ("b", "2", "3")),
    ],
)
def test_first_difference_is_named_with_both_values(old: Any, new: Any, difference: Any) -> None:
    assert first_difference(old, new) == difference


def test_empty_tuple_removes_all_stages() -> None:
    from tiny import EXPERIMENT

    assert override(EXPERIMENT, ["augment=()"]).augment == ()
    with pytest.raises(InputError, match="cannot be set from text"):
        override(EXPERIMENT, ["augment=Flip"])


def test_contents_of_arrays_are_data_and_no_setting() -> None:
    rows = np.zeros((4, 2), np.float32)
    before, now = (
        dataclasses.replace(BASE, train=data.Subset(data.Arrays({"x": x}), np.arange(3)))
        for x in (rows, rows + 1)
    )
    assert config_hash(before) != config_hash(now)  # another run, unless its folder is named
    assert first_difference(*comparable_configs(config_text(before), now)) is None
