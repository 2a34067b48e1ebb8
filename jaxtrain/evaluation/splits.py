"""Which examples are evaluated: a split of the run, or other data with the same fields (``--source``)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.core.errors import InputError
from jaxtrain.data import Source, Subset, paths
from jaxtrain.data.checked import CheckedSource
from jaxtrain.experiment import Experiment, find
from jaxtrain.program.check_fields import check_fields
from jaxtrain.program.check_values import source_indices

SPLITS = ("train", "valid", "test")


def evaluation_split(experiment: Experiment, split: str) -> tuple[Experiment, str]:
    """Return an experiment that evaluates a split, and the name of this split in its program.

    The examples of ``train`` become its test set, without those that are held out for validation.

    Raises:
      InputError: there is no such split.
    """
    if split == "train":
        ids = source_indices(experiment, "train")
        train = experiment.train if ids is None else Subset(experiment.train, ids)
        return dataclasses.replace(experiment, test=train), "test"
    if split == "valid" and experiment.valid is None and not experiment.holdout:
        raise InputError("this run has no valid split: it has train and test")
    return experiment, split


def split_source(experiment: Experiment, split: str) -> Source:
    """Return the source of ``valid`` or ``test``, which may be a part of ``train``."""
    if split == "test":
        return experiment.test
    if experiment.valid is not None:
        return experiment.valid
    ids = source_indices(experiment, "valid")
    assert ids is not None  # evaluation_split has checked it
    return Subset(experiment.train, ids)


def origin(source: Source, ids: np.ndarray) -> tuple[Source, np.ndarray]:
    """Return the source that examples come from, and their numbers in it.

    >>> from jaxtrain import data
    >>> digits = data.Digits("test")
    >>> origin(Subset(digits, np.array([7, 9])), np.array([1]))[1].tolist()
    [9]
    """
    while isinstance(source, Subset):
        ids, source = source.indices[ids], source.source
    return source, ids


def other_source(text: str) -> Source:
    """Return the source that ``--source`` names.

    Args:
      text: ``EXPERIMENT:NAME``, with the name of an experiment or the path of its file, and ``train``,
        ``valid``, ``test`` or the name of a source in that file; without ``:NAME`` its test set. Relative
        paths of its data are looked up like those of the run, and then beside the file.

    Raises:
      InputError: there is no such experiment, or no such source in its file.
    """
    head, colon, name = text.rpartition(":")
    head, name = (head, name) if colon else (text, "test")
    entry = find(head)
    if entry.point is None:
        paths.set_base_folders(*paths.BaseFolders().folders, Path(entry.origin).parent)
    module = entry.module()
    found = getattr(entry.load()[0], name) if name in SPLITS else getattr(module, name, None)
    if isinstance(found, Source) and not isinstance(found, type):
        return found
    known = [k for k, x in vars(module).items() if isinstance(x, Source) and not isinstance(x, type)]
    raise InputError(
        f"--source {text}: {head} has no source {name!r}: give one of {', '.join((*SPLITS, *sorted(known)))}"
    )


def check_source(text: str, other: Source, experiment: Experiment) -> None:
    """Raise InputError unless ``other`` has the fields, dtypes, shapes and classes of the experiment's data.

    Args:
      text: the value of ``--source``, for messages.
      other: what it names.
      experiment: of the run.
    """
    name = f"--source {text}"
    check_fields({"train": CheckedSource("train", experiment.train), name: CheckedSource(name, other)})
    for attribute, what in (("class_names", "class names"), ("classes", "number of classes")):
        mine, theirs = (getattr(source, attribute, None) for source in (experiment.train, other))
        if mine is not None and theirs is not None and _plain(mine) != _plain(theirs):
            raise InputError(
                f"{name}: its {what}, {_shown(theirs)}, differ from the run's, {_shown(mine)}: labels would "
                "mean other classes"
            )


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
