"""jaxtrain.data.checked: what a source returns is converted, or refused in one line."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import losses, optim
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data import Arrays, Order, Series
from jaxtrain.data.checked import CheckedSource, check_dtype, to_arrays
from jaxtrain.experiment import Experiment
from jaxtrain.models import MLP
from jaxtrain.program import assemble
from jaxtrain.program.check_fields import check_fields
from jaxtrain.program.loader import Streamed
from jaxtrain.program.splits import open_sources

X = np.arange(12, dtype=np.float32).reshape(6, 2)


class Tensor:
    """Another library's array."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


class Given:
    """A source of whatever a function returns."""

    def __init__(self, give: Callable[[np.ndarray], Any], n: Any = 6) -> None:
        self.give, self.n = give, n

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: np.ndarray) -> Any:
        return self.give(indices)


def objects(rows: Any) -> np.ndarray:
    array = np.empty(len(rows), object)
    array[:] = list(rows)
    return array


SAME: dict[str, Callable[[np.ndarray], Any]] = {
    "big endian": lambda x: x.astype(">f4"),
    "big endian float64": lambda x: x.astype(">f8"),
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "not contiguous": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "negative strides": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran": np.asfortranarray,
    "float16": lambda x: x.astype(np.float16),
    "list": lambda x: x.tolist(),
    "tuple of arrays": tuple,
    "objects": objects,
    "tensor": Tensor,
    "jax": jax.numpy.asarray,
    "masked without a masked value": np.ma.asarray,
}


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("placement", ["device", "stream"])
def test_any_form_of_an_array_gives_the_same_batch(form: str, placement: str, mesh8: Any) -> None:
    def give(ids: np.ndarray) -> Any:
        return {"x": SAME[form](X[ids % 6]), "label": (ids % 2).tolist()}

    for source in (Given(give, 8), Arrays(give(np.arange(8)))):
        opened = open_sources(experiment(source, placement=placement), mesh8)["train"]
        assert isinstance(opened, Arrays) == (placement == "device" or isinstance(source, Arrays))
        fields = opened.gather(np.array([5, 0, 5]))
        assert np.array_equal(fields["x"], X[[5, 0, 5]]) and fields["x"].dtype.isnative
        assert type(fields["x"]) is np.ndarray and fields["label"].tolist() == [1, 0, 1]


def experiment(source: Any, **changes: Any) -> Experiment:
    settings: dict[str, Any] = {"loss": losses.CrossEntropy(), "batch": 8, "epochs": 1, **changes}
    model = MLP(widths=(2,), classes=2)
    return Experiment(model=model, train=source, test=source, optimizer=optim.SGD(lr=0.1), **settings)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [[1, 2], [3]],
            r"field 'x' cannot be converted to an array \(ValueError: .*one shape, such as by padding",
        ),
        (objects([np.zeros(2), np.zeros(3)]), r"field 'x' cannot be converted to an array"),
        (np.ma.masked_array(X, X > 4), r"field 'x' is a masked array with masked values: fill them"),
        (list(np.ma.masked_array(X, X > 4)), r"field 'x' is a masked array with masked values: fill them"),
        (objects(np.ma.masked_array(X, X > 4)), r"field 'x' is a masked array with masked values: fill them"),
    ],
    ids=["ragged", "ragged objects", "masked", "rows masked", "objects masked"],
)
def test_what_is_no_array_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^train: {message}") as raised:
        to_arrays("train: ", {"x": value})
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=f"^Arrays: {message}"):
        Arrays({"x": value})


def test_a_field_needs_a_name_that_is_text() -> None:
    fields: Any = {0: X}
    gathered = CheckedSource("train", Given(lambda ids: fields)).gather
    for make in (lambda: Arrays(fields), lambda: gathered(np.arange(6))):
        with pytest.raises(InputError, match="field 0 has a name that is no str: name it, such as '0'"):
            make()


def test_splits_of_32_and_64_bits_are_one_dtype_on_a_device(mesh1: Any) -> None:
    train, test = (
        Arrays({"x": X.astype(kind), "label": np.zeros(6, integer)})
        for kind, integer in ((np.float32, np.int32), (np.float64, np.int64))
    )
    check_fields({"train": train, "test": test})
    exp = dataclasses.replace(experiment(train), test=test, batch=6)
    assemble(exp, mesh1).close()
    with pytest.raises(InputError, match=r"'label' is int32\[\] in train and float32\[\] in test"):
        check_fields({"train": train, "test": Arrays({"x": X, "label": np.zeros(6)})})


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (X.astype(np.longdouble), "has dtype float128, which JAX does not have: convert it in the source"),
        (X.astype(np.clongdouble), "has dtype complex256, which JAX does not have"),
        (np.zeros(2, "M8[s]"), r"has dtype datetime64\[s\], which is not numeric"),
        (np.zeros(2, "m8[s]"), r"has dtype timedelta64\[s\], which is not numeric"),
        (np.array(["a"]), "has dtype <U1, which is not numeric"),
        (np.array([b"a"]), r"has dtype \|S1, which is not numeric"),
        (np.array([None]), "has dtype object, which is not numeric"),
        (np.zeros(2, [("a", "f4"), ("b", "i4")]), r"has dtype .*, which is not numeric"),
        (np.array([2**40]), "contains 1099511627776, and JAX stores int64 as int32"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_dtypes_without_a_device_array_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=f"^field 'x' {message}"):
        check_dtype("field 'x'", array)


def test_bool_half_and_small_long_integers_are_accepted() -> None:
    for dtype in (bool, np.float16, jax.numpy.bfloat16, np.int64, np.uint8, np.complex64, np.float64):
        check_dtype("field 'x'", np.ones(2, dtype))


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda ids: [{"x": 1}], r"train: Given\.gather returns a list: it must return a dict of arrays"),
        (lambda ids: X, r"train: Given\.gather returns a ndarray: it must return a dict"),
        (lambda ids: {"x": X[0, 0]}, r"train: field 'x' has shape \[\] for 2 examples: Given\.gather must"),
        (lambda ids: {"x": "ab"}, r"train: field 'x' has shape \[\] for 2 examples"),
        (lambda ids: {"x": X[:5]}, r"train: field 'x' has shape \[5, 2\] for 2 examples: Given\.gather must"),
    ],
    ids=["list", "array", "scalar", "text", "rows"],
)
def test_a_source_that_returns_no_batch_is_refused(give: Any, message: str, mesh8: Any) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        open_sources(experiment(Given(give)), mesh8)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda ids: {"x": X[ids][1:]},
            r"field 'x' has shape \[2, 2\] for 3 examples \(0, 1, 5\): Given\.gather",
        ),
        (
            lambda ids: {"x": X[ids][:, :1]},
            r"as float32\[1\] for 3 examples .* return one shape",
        ),
        (lambda ids: {"y": X[ids]}, r"returns \['y'\] for 3 examples \(0, 1, 5\), and \['x'\] before"),
    ],
    ids=["rows", "shape", "names"],
)
def test_a_source_that_changes_between_calls_is_refused_with_the_examples(give: Any, message: str) -> None:
    source = CheckedSource("train", Given(lambda ids: {"x": X[ids]} if not ids.any() else give(ids)))
    source.gather(np.zeros(2, np.int64))
    with pytest.raises(InputError, match=message):
        source.gather(np.array([0, 1, 5]))


def test_integers_of_another_width_keep_the_first_dtype() -> None:
    """On a device both are int32."""
    source = CheckedSource("train", Given(lambda ids: {"x": ids.astype(np.int64 if ids[0] else np.int32)}))
    assert [source.gather(np.array([n]))["x"].dtype.name for n in (0, 1)] == ["int32", "int32"]


@pytest.mark.parametrize("n", [-1, 1.5, "6", 2**70])
def test_a_length_that_is_no_number_of_examples_is_refused(n: Any, mesh8: Any) -> None:
    with pytest.raises(
        InputError, match=r"^train: len\(Given\) fails \(.*\): its __len__ must return the number"
    ):
        open_sources(experiment(Given(lambda ids: {"x": X[ids]}, n)), mesh8)


def test_an_error_of_a_length_is_raised_unchanged(mesh8: Any) -> None:
    source = Series(file="/none.csv")
    with pytest.raises(InputError, match=r"^/none\.csv cannot be read"):
        open_sources(experiment(source), mesh8)


def test_a_length_above_what_gather_gives_is_named(mesh8: Any) -> None:
    source = Given(lambda ids: {"x": X[ids]}, 9)
    message = r"^train: Given\.gather failed: IndexError: .*; its __len__ says that it has 9 examples"
    with pytest.raises(RunError, match=message):
        open_sources(experiment(source), mesh8)


def test_draw_is_checked_too_and_a_checked_source_can_be_pickled() -> None:
    source = CheckedSource("train", Drawn())
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert copy.draw(np.arange(2), np.zeros(2, int), 0)["x"].tolist() == [1.0, 2.0]
        with pytest.raises(InputError, match=r"Drawn\.draw must return"):
            copy.draw(np.arange(3), np.zeros(3, int), 0)
    assert not hasattr(CheckedSource("train", Given(lambda ids: {})), "draw")


class Drawn:
    """A source whose ``draw`` always returns two examples, as lists."""

    def __len__(self) -> int:
        return 6

    def gather(self, indices: np.ndarray) -> Any:
        return {"x": [0.0] * len(indices)}

    def draw(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> Any:
        return {"x": [1.0, 2.0]}


def test_a_change_while_training_ends_the_run_with_one_line(mesh8: Any) -> None:
    source = CheckedSource("train", Given(lambda ids: {"x": X[ids] if ids.max() < 8 else X[:1]}, 10**6))
    source.source.give = lambda ids: {"x": np.zeros(len(ids))} if LATER[0] else {"x": np.zeros((len(ids), 2))}
    LATER = [False]
    loader = Streamed(source, Order(0, 10**6, 8), mesh8)
    loader.batch(0)
    LATER[0] = True
    with pytest.raises(RunError, match=r"and as float64\[2\] before: .*; earlier checkpoints are kept"):
        for step in range(1, 20):
            loader.batch(step)
    loader.close()


@pytest.mark.parametrize(
    ("label", "fix"),
    [
        (np.zeros((8, 1), int), r"remove the last axis, label\.squeeze\(-1\)"),
        (
            np.eye(2, dtype=int)[np.zeros(8, int)],
            r"it looks one-hot: use class indices, label\.argmax\(-1\)",
        ),
        (np.zeros((8, 5), int), "give one class index for each row of logits"),
    ],
    ids=["column", "one-hot", "other"],
)
def test_labels_of_another_shape_are_refused_with_the_fix(label: np.ndarray, fix: str) -> None:
    with pytest.raises(InputError, match=rf"^field 'label' has shape .* for logits \[8, 2\], .*: {fix}"):
        losses.CrossEntropy()(jax.numpy.zeros((8, 2)), {"label": label})


def test_labels_that_would_be_broadcast_are_refused() -> None:
    with pytest.raises(InputError, match=r"class indices \[8, 3\]"):
        losses.CrossEntropy()(jax.numpy.zeros((8, 3, 2)), {"label": np.zeros((8, 1), int)})


def test_a_run_of_lists_trains(mesh8: Any) -> None:
    source = Given(
        lambda ids: {"image": np.zeros((len(ids), 2, 2, 1)).tolist(), "label": (ids % 2).tolist()}, 16
    )
    program = assemble(experiment(source), mesh8)
    assert set(program.raw_batch(1)) == {"image", "label", "example_id", "epoch"}
    assert type(program.raw_batch(1)["image"]) is np.ndarray
