"""Checks before anything is compiled: whatever can be known to be wrong is said in one line here."""

from jaxtrain.preflight.fields import check_fields, check_splits, describe, notes, trace
from jaxtrain.preflight.folder import check_folder, nearest
from jaxtrain.preflight.values import (
    check_first,
    check_values,
    image_notes,
    listed,
    named,
    not_finite,
    value_check,
)

__all__ = [
    "check_fields",
    "check_first",
    "check_folder",
    "check_splits",
    "check_values",
    "describe",
    "image_notes",
    "listed",
    "named",
    "nearest",
    "not_finite",
    "notes",
    "trace",
    "value_check",
]
