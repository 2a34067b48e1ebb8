"""What a run trusts: no pickle, no code by name from data, no way out of a folder, private caches."""

from __future__ import annotations

import ast
import builtins
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import test_checkpoint as saving
from conftest import ROOT

from jaxtrain import __main__ as commands
from jaxtrain import checkpoint, run
from jaxtrain.checkpoint import folder as folders
from jaxtrain.checkpoint import manifest
from jaxtrain.core import safe_names
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data import TFDS
from jaxtrain.data.data_dir import find_prepared, parse_name
from jaxtrain.data.prepare import download, writer
from jaxtrain.experiment import override
from jaxtrain.train import run_record

# No pickle in our code.

PICKLES = {
    "pickle",
    "_pickle",
    "cPickle",
    "pickletools",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
}
OPENERS = {"torch.load", "pandas.read_pickle", "numpy.core.multiarray._reconstruct"}


def pickles(source: str) -> list[tuple[int, str]]:
    """Line and name of everything in a Python source that opens or writes pickles."""
    tree = ast.parse(source)
    imports = [found for node in ast.walk(tree) for found in imported(node)]
    called = {local: full for _, full, local in imports}
    found = [(line, full) for line, full, _ in imports if PICKLES & {full.split(".")[0], full}]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sorted([*found, *((call.lineno, name) for call in calls for name in opened(call, called))])


def imported(node: ast.AST) -> list[tuple[int, str, str]]:
    """Line, full name and name here of what a statement imports."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return []
    start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [(node.lineno, start + alias.name, alias.asname or alias.name) for alias in node.names]


def opened(call: ast.Call, called: dict[str, str]) -> list[str]:
    """What a call opens that may be a pickle."""
    first, _, rest = ast.unparse(call.func).partition(".")
    full = ".".join(filter(None, (called.get(first, first), rest)))
    found = [full] if full in OPENERS else []
    if full in ("__import__", "importlib.import_module"):
        texts = [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
        found += [text for text in texts if text.split(".")[0] in PICKLES]
    allows = [k.value for k in call.keywords if k.arg == "allow_pickle"]
    allows += call.args[2:3] if full == "numpy.load" else []
    safe = all(isinstance(value, ast.Constant) and value.value is False for value in allows)
    return found if safe else [*found, "allow_pickle"]


def test_no_pickle_in_our_code():
    files = [
        p for top in ("jaxtrain", "scripts", "benchmarks", "experiments") for p in ROOT.glob(f"{top}/**/*.py")
    ]
    assert len(files) > 100
    assert [f"{p}:{line}: {name}" for p in files for line, name in pickles(p.read_text())] == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import pickle", 1),
        ("x = 1\nimport dill as d", 2),
        ("from pickle import loads", 1),
        ("def f():\n    import cloudpickle.fast", 2),
        ("import joblib", 1),
        ("from marshal import load as l", 1),
        ("import shelve, os", 1),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", 2),
        ("import numpy as np\nnp.load(p, allow_pickle=flag)", 2),
        ("from numpy import load\nload(p, None, True)", 2),
        ("import torch\ntorch.load('x')", 2),
        ("from torch import load as get\nget('x')", 2),
        ("import pandas as pd\npd.read_pickle('x')", 2),
        ("__import__('pickle')", 1),
        ("import importlib\nimportlib.import_module('dill.session')", 2),
    ],
)
def test_the_search_for_pickles_finds_them(source, line):
    assert [at for at, _ in pickles(source)] == [line]


def test_the_search_for_pickles_ignores_other_calls():
    good = "import numpy as np, json\nnp.load(p)\nnp.load(p, allow_pickle=False)\njson.load(f)\nnet.load()"
    assert pickles(good) == []


# Names that become paths.


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "...", "a/b", "../a", "/a", "a b", "a\n", "ä", "a\\b", "a:b", "~", "a\0", None, 3]
)
def test_unsafe_names(bad):
    assert not safe_names.is_name(bad)
    with pytest.raises(InputError, match=r"cannot name a folder .*: rename it"):
        safe_names.check(bad, "experiment", "rename it")


def test_a_link_out_of_the_root_is_refused_and_the_root_may_be_a_link(tmp_path):
    real, root = tmp_path / "real", tmp_path / "root"
    (real / "inner").mkdir(parents=True)
    root.symlink_to(real)
    assert safe_names.inside(root, "inner", "x", what="w", fix="f") == root / "inner" / "x"
    (real / "out").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads out of"):
        safe_names.inside(root, "out", "x", what="w", fix="f")


def test_an_experiment_name_must_be_safe_as_a_folder_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my exp.py").write_text((ROOT / "tests" / "tiny.py").read_text())
    assert run.main(["--experiment", "my exp.py"]) == 2
    error = capsys.readouterr().err
    assert "experiment 'my exp' cannot name a folder" in error and "--workdir" in error
    assert {p.name for p in tmp_path.iterdir()} <= {"my exp.py", "__pycache__"}  # Python's own


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a/..", "/etc", "a b", "mnist/x/../..", "mnist:٣.0.0"])
def test_names_of_data_sets_stay_in_their_folder(name, tmp_path):
    for look in (parse_name, lambda n: find_prepared(n, tmp_path), lambda n: TFDS(n).prepared()):
        with pytest.raises(InputError, match="expected NAME"):
            look(name)


def test_a_config_name_in_a_data_folder_cannot_leave_it(tmp_path):
    (tmp_path / "mine" / ".config").mkdir(parents=True)
    (tmp_path / "mine" / ".config" / "metadata.json").write_text('{"default_config_name": "../../other"}')
    with pytest.raises(InputError, match=r"mine: default config '../../other' cannot name a folder"):
        find_prepared("mine", tmp_path)


def reseal(folder: Path, **changes) -> None:
    """Change a checkpoint's manifest as somebody would who knows how it is made."""
    path = folder / "manifest.json"
    full = json.loads(path.read_text()) | changes
    full["seal"] = manifest._expected_seal(full)
    path.write_text(json.dumps(full))


@pytest.fixture
def saved_run(tmp_path, mesh1):
    """A folder with the checkpoint of step 3."""
    saving.save(tmp_path / "run", 3, mesh=mesh1)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["../../../outside", "/outside", "state/../../../../outside"])
def test_files_outside_the_checkpoint_in_a_manifest_are_not_opened(
    name, saved_run, tmp_path, mesh1, monkeypatch
):
    (tmp_path / "outside").write_text("x")
    listed = {name.replace("/outside", f"{tmp_path}/outside") if name[0] == "/" else name: [1, "0" * 64]}
    folder = saved_run / "checkpoints" / "000003"
    reseal(folder, files=listed)
    with pytest.raises(RunError, match="is missing"), checkpoint.open(saved_run) as saved:
        saved.restore(saved.latest(), saving.like(saving.make_state(mesh1)))


# Links, when something is deleted.


def test_nothing_is_deleted_through_a_link(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run" / "checkpoints"
    (outside / "000004" / "state").mkdir(parents=True)
    (outside / "000004" / "state" / "precious").write_text("x")
    folder.mkdir(parents=True)
    (folder / ".trash-000001-7").symlink_to(outside)
    (folder / "000002").mkdir()
    (folder / "000002" / ".saving").touch()
    (folder / "000002" / "state").symlink_to(outside / "000004")
    folders.clean(folder)
    (folder / "000003").symlink_to(outside)
    folders.remove(folder / "000003")
    assert (outside / "000004" / "state" / "precious").exists()
    assert list(folder.iterdir()) == []


def test_a_checkpoint_folder_that_is_a_link_is_refused(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other" / "checkpoints"
    (other / ".trash-000001-7").mkdir(parents=True)
    (other / "000002").mkdir()
    mine.mkdir()
    (mine / "checkpoints").symlink_to(other)
    with pytest.raises(InputError, match="is a link, which is not followed"):
        folders.clean(mine / "checkpoints")
    with pytest.raises(OSError, match="is a link"):
        folders.remove(mine / "checkpoints" / "000002")
    assert sorted(p.name for p in other.iterdir()) == [".trash-000001-7", "000002"]


def test_prepare_deletes_nothing_through_a_link(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (outside / "incomplete.a", root / "incomplete.mine"):
        path.mkdir(parents=True)
        os.utime(path, (0, 0))
    (root / "config").symlink_to(outside)
    (root / "incomplete.link").symlink_to(outside)
    os.utime(outside, (0, 0))
    writer._remove_stale(root)
    assert (outside / "incomplete.a").exists() and not (root / "incomplete.mine").exists()


# Data names no code.


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that can be imported and must not be; gives a function that tells whether it was asked for."""
    place = tmp_path / "modules"
    place.mkdir()
    (place / "trap_module.py").write_text("class Trap: pass\n")
    monkeypatch.syspath_prepend(place)
    asked, real = [], builtins.__import__

    def note(name, *args, **kwargs):
        asked.append(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", note)
    yield lambda: "trap_module" in sys.modules or any(name.startswith("trap_module") for name in asked)
    sys.modules.pop("trap_module", None)


def poison(value):
    """JSON with every text replaced by the name of a class, and such names added."""
    if isinstance(value, dict):
        return {key: poison(item) for key, item in value.items()} | {
            "__class__": "trap_module.Trap",
            "module": "trap_module",
            "class_name": "trap_module.Trap",
        }
    if isinstance(value, list):
        return [poison(item) for item in value]
    return "trap_module.Trap" if isinstance(value, str) else value


def test_a_checkpoint_runs_no_code(saved_run, mesh1, trap):
    """Every JSON file of it, Orbax's included, names a module; its seal and checksums are made to fit."""
    folder, errors = saved_run / "checkpoints" / "000003", []
    like = saving.like(saving.make_state(mesh1))
    texts = [p for p in folder.rglob("*") if p.is_file() and p.read_bytes()[:1] == b"{"]
    assert len(texts) > 2
    full = {path: path.read_bytes() for path in texts}
    for path in texts:
        changed = poison(json.loads(full[path]))
        if path.name == "manifest.json":
            kept = ("files", "fingerprints", "tree", "format", "step", "score")
            changed |= {name: json.loads(full[path])[name] for name in kept}
        path.write_text(json.dumps(changed))
        sums = {name: manifest._checksum(file) for name, file in manifest._files(folder).items()}
        reseal(folder, files=sums)
        try:
            with checkpoint.open(saved_run) as saved:
                saved.restore(saved.latest(), like)
        except (InputError, RunError) as error:
            errors.append(error)
        for other, data in full.items():
            other.write_bytes(data)
    assert not trap()
    assert len(errors) < len(texts)  # some were restored all the same: it was not only refused


@pytest.mark.parametrize(
    "setting",
    ["model=os.system", "model=trap_module.Trap", "loss=trap_module:Trap", "train=trap_module.Trap",
     "optimizer=__import__('trap_module')", "step_factory=trap_module.Trap", "augment=(trap_module.Trap,)",
     "model.__class__=trap_module.Trap", "batch=__import__('trap_module').Trap"],
)  # fmt: skip
def test_an_override_runs_no_code(setting, trap):
    import tiny

    with pytest.raises(InputError):
        override(tiny.EXPERIMENT, [setting])
    assert not trap()


@pytest.mark.parametrize(
    "name", ["trap_file", "{}/modules/trap_module.py", "os.system", "../modules/trap_module.py"]
)
def test_a_run_record_runs_no_code(name, tmp_path, trap, capsys, monkeypatch):
    """An edited config.json: the experiment is looked for among those that are listed, and nowhere else."""
    monkeypatch.chdir(tmp_path)
    Path("r").mkdir()
    file = tmp_path / "modules" / "trap_module.py"
    record = {"name": name.format(tmp_path), "origin": str(file), "overrides": [], "config": {}}
    Path("r", "config.json").write_text(json.dumps(record))
    for verb in ("evaluate", "sample"):
        assert commands.main([verb, "--workdir", "r"]) == 2
        assert "--experiment" in capsys.readouterr().err
    assert not trap() and not any(str(file) == getattr(m, "__file__", "") for m in list(sys.modules.values()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 3},
        {"config": []},
        {"config": {"a": 1}},
        {"overrides": [1]},
        {"init_from": "x"},
        {"data": [1]},
        {"data": {"train": {"length": 1}}},
        {"resumed": [1]},
        {"code": 1},
    ],
)
def test_a_malformed_run_record_is_a_one_line_error(wrong, tmp_path):
    record = {"name": "a", "config": {}} | wrong
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="restore it from a copy"):
        run_record.load(tmp_path)


@pytest.mark.parametrize("form", ["pythonClassName", "python_class_name", "type"])
def test_a_prepared_data_set_runs_no_code(form, tmp_path, trap):
    """TFDS imports the classes that features.json names."""
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(
        '{"fileFormat": "array_record", "name": "mine", "version": "1.0.0"}'
    )
    (folder / "features.json").write_text(json.dumps({form: "trap_module.Trap", "content": {}}))
    with pytest.raises(InputError, match=r"names 'trap_module.Trap', which is not a TFDS feature"):
        len(TFDS("mine", data_dir=str(tmp_path)))
    assert not trap()


# What is executed from is made for its owner alone.


@pytest.fixture
def umask0():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def test_compilation_cache_is_private(umask0, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "a" / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert commands.main(["prepare", "no_such/data set"]) == 2
    assert mode(cache) == 0o700 and "WARNING" not in capsys.readouterr().err
    cache.chmod(0o770)
    assert commands.main(["prepare", "no_such/data set"]) == 2
    assert (
        "WARNING: others can write to JAX_COMPILATION_CACHE_DIR, and JAX runs the programs in it: "
        f"chmod 700 {cache}" in (capsys.readouterr().err)
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "x"))
    assert commands.main(["prepare", "x"]) == 2
    assert "cannot be created (Not a directory): set another" in capsys.readouterr().err


def test_download_folders_are_private(umask0, tmp_path):
    with download.fetch("x", [], lambda *_: None, tmp_path / "root") as place:
        assert mode(place) == 0o700
