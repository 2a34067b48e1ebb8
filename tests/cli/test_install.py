"""A wheel contains the experiments; an editable install sees edits; the commands in README work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {
    "README": README,
    **{
        name: (ROOT / "docs" / f"{name}.md").read_text()
        for name in ("parallelism", "evaluate", "deploy", "explain", "report", "serve", "sweep", "trackers")
    },
}
BLOCK = re.compile(r"^ *```(\w+)([^\n]*)\n(.*?)^ *```", re.M | re.S)
BLOCKS = [block for page in PAGES.values() for block in BLOCK.findall(page)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of all files that git tracks or would add."""
    copy = tmp_path_factory.mktemp("tree") / "jaxtrain"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def clean_venv(folder: Path) -> Path:
    """Make an environment with our dependencies, but without our editable install of jaxtrain."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Python searches a folder named in a .pth file, but ignores the .pth files in it, such as ours.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *args) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", *args], check=True)


def list_experiments(python: Path, cwd: Path) -> str:
    done = subprocess.run(
        [python, "-m", "jaxtrain.run", "--list"], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.full("tests/experiment/test_registry.py")
def test_a_wheel_installed_elsewhere_finds_the_shipped_experiments(tree, tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree]
    subprocess.run(build, check=True, capture_output=True)
    python = clean_venv(tmp_path / "venv")
    install(python, next(tmp_path.glob("*.whl")))
    where = [python, "-c", "import jaxtrain; print(jaxtrain.__file__, jaxtrain.__version__)"]
    assert str(tmp_path / "venv") in subprocess.check_output(where, text=True, cwd=tmp_path)
    data = [python, "-c", "from jaxtrain.sharding.cards import load_card; print(load_card('h100').memory)"]
    assert int(subprocess.check_output(data, text=True, cwd=tmp_path)) > 8e10
    shipped = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    out = list_experiments(python, tmp_path)
    assert shipped <= set(re.findall(r"^\w+", out, re.M))
    smoke = [
        python,
        "-m",
        "jaxtrain.run",
        "--experiment",
        "digits_cnn",
        "--smoke",
        "--set",
        "model.widths=8,16",
    ]
    assert b"passed" in subprocess.check_output(smoke, cwd=tmp_path)


@pytest.mark.full("tests/experiment/test_registry.py")
def test_an_editable_install_sees_an_edited_experiment(tree, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    python = clean_venv(tmp_path / "venv")
    install(python, "-e", copy)
    path = copy / "experiments" / "digits_cnn.py"
    path.write_text('"""Edited just now.\n' + path.read_text().partition("\n")[2])
    assert "Edited just now." in list_experiments(python, tmp_path)


@pytest.mark.parametrize(
    ("header", "extra"),
    [
        ("| NVIDIA-SMI 580.1  Driver Version: 580.1   CUDA Version: 13.0 |", "cuda13"),
        ("| NVIDIA-SMI 550.9  Driver Version: 550.9   CUDA Version: 12.4 |", "cuda12"),
        ("| NVIDIA-SMI 470.1  Driver Version: 470.1   CUDA Version: 11.4 |", ""),
        ("NVIDIA-SMI has failed because it could not communicate with the driver.", ""),
        (None, ""),
    ],
)
def test_setup_picks_the_cuda_build_of_the_driver(header, extra, tmp_path):
    if header is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{header}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    found = subprocess.run(
        ["bash", "-c", ". scripts/setup; cuda_extra"],
        cwd=ROOT,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == extra


def runnable(language: str) -> list[str]:
    """The blocks that are run, without duplicates."""
    return list(dict.fromkeys(t for name, info, t in BLOCKS if name == language and "no-run" not in info))


def test_readme_shows_the_two_scripts_and_every_command():
    commands = "\n".join(text for name, _, text in BLOCKS if name == "bash")
    assert "scripts/run --experiment digits_cnn" in commands and "scripts/test" in commands
    from jaxtrain.cli import SUMMARIES

    assert all(f"`{command}`" in README for command in SUMMARIES)


def test_no_run_commands_name_existing_scripts_and_experiments():
    """Blocks marked no-run need a network, real data or an hour; their scripts and commands must exist."""
    from jaxtrain.cli import SUMMARIES

    shown = [text for name, info, text in BLOCKS if name == "bash" and "no-run" in info]
    for line in "\n".join(shown).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].startswith("scripts/"):
            assert (ROOT / words[0]).exists(), line
        if words[:3] == ["python", "-m", "jaxtrain"]:
            assert words[3] in SUMMARIES, line
        if "--experiment" in words:
            assert (ROOT / "experiments" / f"{words[words.index('--experiment') + 1]}.py").exists(), line


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
@pytest.mark.parametrize("page", PAGES)
def test_commands_run_as_written(page, tree, tmp_path):
    """In a copy of the tree with an installed environment; ``scripts/test`` itself is left out."""
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy)
    install(clean_venv(copy / ".venv"), "-e", copy)
    subprocess.run(["bash", "-c", '. scripts/setup; touch "$(stamp)-base"'], cwd=copy, check=True)
    env = {**os.environ, "PATH": f"{copy}/.venv/bin:{os.environ['PATH']}", "JAX_NUM_CPU_DEVICES": "1"}
    shown = {name: [block[2] for block in BLOCK.findall(text)] for name, text in PAGES.items()}
    texts = [t for t in runnable("bash") if next(name for name in shown if t in shown[name]) == page]
    blocks = [re.sub(r"^scripts/test\b.*$", "", text, flags=re.M) for text in texts]
    assert any(block.strip() for block in blocks)
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block], cwd=copy, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.full("jaxtrain/train/session.py::jaxtrain.train.session.fit")
@pytest.mark.parametrize("text", runnable("python"))
def test_readme_examples_run_as_written(text, python, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(text)
    done = python("-W", "error", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example prints something"
