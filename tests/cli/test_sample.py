"""``python -m jaxtrain sample``: generate text with a run's language model."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT

from jaxtrain import run
from jaxtrain.cli import sample

EXPERIMENT = """'''A language model over the bytes of one file.'''
from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment

def text(split):
    return data.TextWindows(context=8, split=split, stride=3, file="abc.txt")

EXPERIMENT = Experiment(
    model=models.GPT(vocab=128, context=8, width=16, depth=1, heads=2, dropout=0.0),
    train=text("train"), test=text("test"), loss=losses.CrossEntropy(),
    optimizer=optim.Adam(lr=1e-2), batch=16, epochs=3, eval_every=None,
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    """A run that has memorised the first letters of the alphabet."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "abc.txt").write_text("abcdefgh" * 500)
    (folder / "abc.py").write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run.main(["--experiment", "abc.py", "--workdir", "run"]) == 0
    return folder


@pytest.fixture
def sample_run(folder: Any, monkeypatch: Any, capsys: Any) -> Any:
    monkeypatch.chdir(folder)

    def call(*args: str) -> tuple[int, str, str]:
        code = sample.main(["--workdir", "run", "--experiment", "abc.py", *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.full("tests/models/test_models_gpt.py")
def test_the_text_continues_the_prompt_past_the_context(sample_run: Any) -> None:
    code, out, _ = sample_run("--prompt", "cde", "--bytes", "21", "--temperature", "0")
    assert (code, out) == (0, "cdefghabcdefghabcdefghab\n")


@pytest.mark.full("tests/models/test_models_gpt.py")
def test_the_training_text_is_not_needed(folder: Any, sample_run: Any) -> None:
    (folder / "abc.txt").rename(folder / "elsewhere.txt")
    try:
        code, out, err = sample_run("--prompt", "cde", "--bytes", "3", "--temperature", "0")
    finally:
        (folder / "elsewhere.txt").rename(folder / "abc.txt")
    assert (code, out, err) == (0, "cdefgh\n", "")


@pytest.mark.full("tests/models/test_models_gpt.py")
def test_a_prompt_may_have_any_bytes(sample_run: Any) -> None:
    """A shell passes the byte 255, which is not UTF-8, in this form; this model has bytes up to 127."""
    assert "token 255 of example 0" in sample_run("--prompt", "\udcff")[2]


@pytest.mark.full("tests/models/test_models_gpt.py")
def test_the_text_depends_on_the_seed(sample_run: Any) -> None:
    hot = ["--temperature", "3", "--bytes", "30", "--prompt", "a"]
    one, again, other = (sample_run(*hot, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert one == again != other
    assert set(sample_run(*hot, "--top-k", "1")[1]) <= set("abcdefgh\n")


@pytest.mark.full("tests/models/test_models_gpt.py")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "é"], "token 195 of example 0 is outside the vocabulary of 128"),
        (["--bytes", "0"], "--bytes 0: give at least 1"),
        (["--temperature", "-1"], "--temperature -1.0: give 0"),
        (["--top-k", "0"], "--top-k 0: give at least 1"),
        (["--seed", str(2**70)], f"--seed {2**70}: it must be in [0, 2**31)"),
        (["--top-k", "129"], "top_k=129 with a vocabulary of 128"),
        (["--checkpoint", "7"], "--weights 7: give best, latest or a saved step"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str, sample_run: Any) -> None:
    code, out, err = sample_run(*args)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.full("tests/checkpoint/test_checkpoint.py")
def test_a_run_of_another_model_is_refused(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = str(ROOT / "tests" / "tiny.py")
    assert run.main(["--experiment", tiny, "--workdir", "run", "--set", "epochs=0.1"]) == 0
    assert sample.main(["--workdir", "run", "--experiment", tiny]) == 2
    assert "tiny is not a language model over bytes" in capsys.readouterr().err
