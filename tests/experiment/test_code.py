"""The code that a run depends on: the user's files, found from import to import, whatever is loaded."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.core import user_modules
from jaxtrain.experiment import code, find

FILES = {
    "exp.py": "import json, numpy as np\nimport jaxtrain\nfrom one import x\ndef later():\n    import lazy\n"
    "    __import__('named'), importlib.import_module('asked')\n",
    "one.py": "from pack_a import part\nx = part.y\n",
    "pack_a/__init__.py": "",
    "pack_a/part.py": "from . import other\nfrom .deep.leaf import z\ny = 1\n",
    "pack_a/other.py": "import importlib\ndynamic = importlib.import_module('two')\n",
    "pack_a/deep/leaf.py": "z = 2\n",  # in a namespace package
    "pack_a/unused.py": "",
    "two.py": "",
    "lazy.py": "import broken, missing_module\n",
    "named.py": "",
    "asked.py": "",
    "broken.py": "this is no Python\n",
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = set(sys.modules)
    yield user_modules.load(tmp_path / "exp.py")
    for name in set(sys.modules) - loaded:
        del sys.modules[name]


def test_files_are_found_from_import_to_import(module: types.ModuleType, tmp_path: Path) -> None:
    found = code.digests(module, None)
    assert set(found) == set(FILES) - {"pack_a/unused.py"}
    assert code.digests(module, None) == found  # where everything is loaded already
    (tmp_path / "pack_a" / "deep" / "leaf.py").write_text("z = 3  # only a comment\n")
    assert code.changes(found, code.digests(module, None)) == ["pack_a/deep/leaf.py"]


def test_the_classes_of_an_experiment_count_without_its_module() -> None:
    class Loss:
        def __call__(self, outputs: Any, batch: Any) -> Any: ...

    (path,) = code.digests(None, (Loss(), {"a": [Loss]}, len))
    assert path.endswith("test_code.py")


def test_shipped_experiments_are_one_file() -> None:
    entry = find("digits_cnn")
    experiment, _ = entry.load()
    assert list(code.digests(entry.module(), experiment)) == ["digits_cnn.py"]


def test_a_notebook_has_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    assert code.is_interactive() and code.main_module() is None
    sys.modules["__main__"].__file__ = "<stdin>"
    assert code.is_interactive() and code.main_module() is None


def test_a_module_run_by_name_imports_from_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m app.train`` is ``__main__``, and a relative import in it is one from ``app``."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "train.py").write_text("from .settings import S\n")
    (tmp_path / "app" / "settings.py").write_text("S = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    script = types.ModuleType("__main__")
    script.__file__, script.__package__ = str(tmp_path / "app" / "train.py"), "app"
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert set(code.digests(code.main_module(), None)) == {"train.py", "app/settings.py"}


def test_a_script_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text("print()\n")
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert not code.is_interactive()
    assert list(code.digests(code.main_module(), None)) == ["script.py"]
