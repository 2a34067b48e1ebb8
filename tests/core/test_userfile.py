"""jaxtrain.core.user_modules: files loaded by path, under names that other processes can restore."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.core import user_modules
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
    """No file stays loaded, and no module beside it."""
    before = set(sys.modules)
    yield
    user_modules._siblings.use("")
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit()", "SystemExit: 0: move what ends the process"),
        ("raise SystemExit('first\\nsecond')", "SystemExit: first: move"),
        (
            "import argparse; p = argparse.ArgumentParser(); p.add_argument('x'); p.parse_args([])",
            r"SystemExit: argparse: the following arguments are required: x: move",
        ),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
    ],
    ids=["exit", "text", "argparse", "base exception"],
)
def test_file_that_ends_the_process_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"exits.py cannot be imported: {message}") as raised:
        load(write(tmp_path / "exits.py", text))
    assert "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", ""), "no usage"


def test_what_a_file_prints_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(write(tmp_path / "prints.py", "print('loaded')"))
    assert capsys.readouterr() == ("", "loaded\n")


def test_file_imports_modules_and_packages_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "from pack.inner import NUMBER")
    write(tmp_path / "pack" / "__init__.py", "")
    write(tmp_path / "pack" / "inner.py", "from . import base\nNUMBER = base.NUMBER")
    write(tmp_path / "pack" / "base.py", "NUMBER = 7")
    lazily = "def later():\n    import late\n    return late.NUMBER"
    module = load(write(tmp_path / "mine.py", f"import helper\n{lazily}"))
    write(tmp_path / "late.py", "NUMBER = 8")
    assert (module.helper.NUMBER, module.later()) == (7, 8)


def test_files_in_two_folders_import_their_own_modules(tmp_path: Path) -> None:
    text = "import helper\n\ndef later():\n    import helper\n    return helper.NUMBER"
    for number in (1, 2):
        write(tmp_path / str(number) / "helper.py", f"NUMBER = {number}")
        write(tmp_path / str(number) / "mine.py", text)
    one, two = (load(tmp_path / str(number) / "mine.py") for number in (1, 2))
    assert (one.helper.NUMBER, two.helper.NUMBER, two.later()) == (1, 2, 2)
    assert load(tmp_path / "1" / "mine.py").later() == 1 and sys.modules["helper"] is one.helper


def test_modules_beside_a_file_hide_nothing_but_those_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experiments"
    for name in ("colorsys", "iniconfig", "helper"):  # of the standard library, installed, and neither
        write(folder / f"{name}.py", "MINE = True")
        monkeypatch.delitem(sys.modules, name, raising=False)
    write(tmp_path / "helper.py", "MINE = False")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = load(write(folder / "mine.py", "import colorsys, iniconfig, helper"))
    assert (
        not hasattr(module.colorsys, "MINE") and not hasattr(module.iniconfig, "MINE") and module.helper.MINE
    )


def test_worker_process_restores_a_class_from_a_module_beside_a_file(tmp_path: Path, python: Any) -> None:
    write(tmp_path / "helper.py", CLASS.format(size=3))
    write(tmp_path / "other" / "helper.py", "")
    files = [write(tmp_path / name, "import helper") for name in ("other/mine.py", "mine.py")]
    sent = UserModule(tuple(map(str, files)))  # loads them, and not what other tests have loaded
    module = load(files[1])
    (tmp_path / "sent").write_bytes(pickle.dumps((sent, module.helper.Thing(size=7))))
    program = "import pickle, sys\nprint(pickle.load(open(sys.argv[1], 'rb'))[1].size)"
    done = python(write(tmp_path / "worker.py", program), tmp_path / "sent")
    assert done.stdout == "7\n", done.stderr


def test_pickling_for_a_worker_changes_no_module_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader's thread pickles while the main thread imports: it may not even take modules aside."""
    for name in ("one", "two"):
        write(tmp_path / name / "helper.py", f"NAME = {name!r}")
        load(write(tmp_path / name / "mine.py", "import helper"))
    monkeypatch.setattr(user_modules, "load", lambda path: pytest.fail(f"loads {path}"))
    pickle.dumps(UserModule())
    assert sys.modules["helper"].NAME == "two"


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
