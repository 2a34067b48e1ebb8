import pytest

from jaxtrain.core.text import did_you_mean, first_line, size_text


class NoText(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("modle", {}, "did you mean model?"),
        ("modle", {"prefix": "mesh."}, "did you mean mesh.model?"),
        ("modle", {"otherwise": "see --list"}, "did you mean model?"),
        ("zzz", {}, "there are data, fsdp, model"),
        ("zzz", {"otherwise": "see --list"}, "see --list"),
        ("zzz", {"otherwise": ""}, ""),
    ],
)
def test_did_you_mean(name, options, hint):
    assert did_you_mean(name, iter(("data", "fsdp", "model")), **options) == hint


def test_did_you_mean_without_choices():
    assert did_you_mean("model", ()) == "there are none"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n \n  two \nthree"), "two"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("key"), "'key'"),
        (NoText(), "NoText"),
        ("\none\ntwo", "one"),
        ("", ""),
    ],
)
def test_first_line(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.96, "1.00 KB"),
        (1000, "1.00 KB"),
        (1_234_567, "1.23 MB"),
        (999_999_999, "1.00 GB"),
        (80e9, "80.00 GB"),
        (1.5e15, "1,500.00 TB"),
    ],
)
def test_size_text(size, text):
    assert size_text(size) == text
