"""jaxtrain.core.user_modules: files loaded by path, under names that other processes can restore."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.core.user_modules import PREFIX, UserModule, load

CLASS = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass(frozen=True)
class Thing:
    size: int = {size}
    other: Thing | None = None
"""


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """No file stays loaded."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(PREFIX):
            del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_file_is_loaded_once_for_all_spellings_of_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine.py", "LOADED = []")
    link = tmp_path / "link.py"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert load(path) is load(str(path)) is load("mine.py") is load("../" + tmp_path.name + "/mine.py")
    assert load(link) is load(path)


def test_files_with_the_same_name_are_different_modules(tmp_path: Path) -> None:
    one, two = (load(write(tmp_path / str(n) / "same.py", CLASS.format(size=n))) for n in (1, 2))
    assert (one.Thing().size, two.Thing().size) == (1, 2)
    assert one.__name__ != two.__name__


def test_dataclasses_with_postponed_annotations_work_and_pickle(tmp_path: Path) -> None:
    module = load(write(tmp_path / "mine.py", CLASS.format(size=3)))
    thing = module.Thing(other=module.Thing(size=9))
    assert pickle.loads(pickle.dumps(thing)) == thing


def test_unpickling_user_modules_makes_their_classes_importable(tmp_path: Path) -> None:
    module = load(write(tmp_path / "mine.py", CLASS.format(size=3)))
    sent = pickle.dumps((UserModule(), module.Thing(size=7)))
    alone = pickle.dumps(module.Thing())
    del sys.modules[module.__name__]
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(alone)
    assert pickle.loads(sent)[1].size == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("x = 1 +", r"SyntaxError: .*line 1"),
        ("raise ValueError('first\\nsecond')", "ValueError: first"),
    ],
    ids=["import", "syntax", "two lines"],
)
def test_broken_file_is_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "broken.py", text)
    with pytest.raises(InputError, match=f"broken.py cannot be imported: {message}") as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_input_error_of_a_file_is_raised_unchanged(tmp_path: Path) -> None:
    text = "from jaxtrain.losses import CrossEntropy\nCrossEntropy(smoothing=2)"
    with pytest.raises(InputError, match=r"^loss.smoothing is 2"):
        load(write(tmp_path / "bad.py", text))


@pytest.mark.parametrize("error", ["ValueError()", "SystemExit(3)", "KeyboardInterrupt()"])
def test_failed_file_leaves_no_module(tmp_path: Path, error: str) -> None:
    path = write(tmp_path / "mine.py", f"FIRST = 1\nraise {error}")
    with pytest.raises((InputError, SystemExit, KeyboardInterrupt)):
        load(path)
    path.write_text("FIRST = SECOND = 2")
    assert load(path).SECOND == 2


@pytest.mark.parametrize("name", ["absent.py", "folder.py", "notes.txt"])
def test_path_that_is_not_a_python_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.py").mkdir()
    write(tmp_path / "notes.txt", "hello")
    with pytest.raises(InputError, match=rf"{name} is not a Python file"):
        load(tmp_path / name)
