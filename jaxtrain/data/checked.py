"""What a source returns, as NumPy arrays that JAX takes: converted and checked here only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line

if TYPE_CHECKING:
    from jaxtrain.data.sources import Source

SHOWN = 5  # example ids in a message


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CheckedSource:
    """A user's source, with arrays of the same names and shapes in every call.

    Attributes:
      split: ``train``, ``valid`` or ``test``, for messages.
      source: may return whatever ``to_arrays`` converts.
    """

    split: str
    source: Source
    _first: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict, init=False)

    @property
    def class_name(self) -> str:
        """The name of the source's class, for messages."""
        return type(self.source).__name__

    def __len__(self) -> int:
        """Return the number of examples.

        Raises:
          InputError: the source's ``__len__`` does not return one.
        """
        try:
            return len(self.source)
        except (InputError, RunError):
            raise
        except Exception as error:  # a user's own source: anything may come out of it
            raise InputError(
                f"{self.split}: len({self.class_name}) fails ({first_line(error)}): its __len__ must return "
                "the number of examples, an int"
            ) from error

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields of the examples ``indices``.

        Raises:
          InputError: they are no arrays of numbers, or not those of the first call with other rows.
        """
        return self._checked("gather", self.source.gather(indices), indices)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("source", "split"):  # not set yet, in a copy
            raise AttributeError(name)
        found = getattr(self.source, name)
        if name != "draw":
            return found
        return lambda ids, epochs, seed: self._checked("draw", found(ids, epochs, seed), ids)

    def _checked(self, method: str, fields: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
        what = f"{self.split}: {self.class_name}.{method}"
        if not isinstance(fields, Mapping):
            raise InputError(
                f"{what} returns a {type(fields).__name__}: it must return a dict of arrays, one for each "
                "field, such as {'image': np.stack(images), 'label': np.array(labels)}"
            )
        arrays = to_arrays(f"{self.split}: ", fields)
        for name, array in arrays.items():
            if array.shape[:1] != (len(ids),):  # a single image could pass for a batch
                raise InputError(
                    f"{self.split}: field {name!r} has shape {list(array.shape)} for {_ids(ids)}: "
                    f"{self.class_name}.{method} must return arrays with a leading axis of that length, such "
                    "as np.stack(examples)"
                )
            check_dtype(f"{self.split}: field {name!r}", array)
        first = self._first.setdefault(method, _no_rows(arrays))
        if first.keys() != arrays.keys():
            raise InputError(f"{what} returns {sorted(arrays)} for {_ids(ids)}, and {sorted(first)} before")
        for name, array in arrays.items():
            arrays[name] = _like_first(what, name, array, first[name], ids)
        return arrays


def to_arrays(where: str, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return fields as NumPy arrays in the byte order of this machine.

    Lists, tuples, other libraries' arrays (through ``__array__``) and arrays of equal-sized arrays are
    converted; the rest is not copied.

    Args:
      where: begins a message, such as ``"train: "``.
      fields: by name.

    Raises:
      InputError: rows of different shapes, masked values, or a name that is no str.

    >>> to_arrays("", {"x": [[1, 2], [3, 4]], "y": np.zeros(2, ">f4")})["y"].dtype.isnative
    True
    """
    for name in fields:
        if not isinstance(name, str):
            raise InputError(
                f"{where}field {name!r} has a name that is no str: name it, such as {str(name)!r}"
            )
    return {name: _to_array(f"{where}field {name!r}", value) for name, value in fields.items()}


def check_dtype(what: str, array: np.ndarray) -> None:
    """Raise InputError for values that no device array has: text, objects, and integers that would wrap."""
    if array.dtype in (np.longdouble, np.clongdouble):
        raise InputError(
            f"{what} has dtype {array.dtype}, which JAX does not have: convert it in the source, such as "
            "with .astype(np.float32)"
        )
    if array.dtype.kind == "m" or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise InputError(
            f"{what} has dtype {array.dtype}, which is not numeric: encode it as numbers in the source, or "
            "leave the field out"
        )
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)  # JAX turns 64 bits into 32 without a warning
    if dtype != array.dtype and np.issubdtype(dtype, np.integer) and array.size:
        low, high = int(array.min()), int(array.max())
        if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
            raise InputError(
                f"{what} contains {low if low < np.iinfo(dtype).min else high}, and JAX stores {array.dtype} "
                f"as {dtype}: use smaller numbers, or leave the field out"
            )


def _to_array(what: str, value: Any) -> np.ndarray:
    objects = isinstance(value, np.ndarray) and value.dtype.kind == "O" and value.ndim
    rows = value if objects or isinstance(value, list | tuple) else ()
    if np.ma.is_masked(value) or any(isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x) for x in rows):
        raise InputError(f"{what} is a masked array with masked values: fill them, as with .filled(0)")
    try:
        array = np.asarray(value)
        if array.dtype == object and array.ndim:  # such as an array of equal-sized arrays
            array = np.array(array.tolist())
    except Exception as error:  # of NumPy, or of the __array__ of another library
        raise InputError(
            f"{what} cannot be converted to an array ({type(error).__name__}: {first_line(error)[:200]}): "
            "make it one in the source; all examples need one shape, such as by padding"
        ) from error
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _like_first(what: str, name: str, array: np.ndarray, first: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return ``array``, in the dtype of the first call where both are one dtype on a device.

    Any other dtype compiles the step again, which ``train.recompile`` reports.

    Raises:
      InputError: it has another shape than in the first call.
    """
    if array.shape[1:] != first.shape[1:]:
        raise InputError(
            f"{what} returns field {name!r} as {array.dtype}{list(array.shape[1:])} for {_ids(ids)}, and as "
            f"{first.dtype}{list(first.shape[1:])} before: return one shape, such as by padding or cropping"
        )
    same = jax.dtypes.canonicalize_dtype(array.dtype) == jax.dtypes.canonicalize_dtype(first.dtype)
    return array.astype(first.dtype, copy=False) if same else array


def _no_rows(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.empty((0, *array.shape[1:]), array.dtype) for name, array in arrays.items()}


def _ids(ids: np.ndarray) -> str:
    if len(ids) == 1:
        return f"example {ids[0]}"
    if not ids.any():  # the first example several times, to learn the shapes
        return f"{len(ids)} examples"
    shown = ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
    return f"{len(ids):,} examples ({shown})"
