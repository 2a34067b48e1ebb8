"""The grammar of ``--set``: config.json's text is read as the same value; any other is read or refused."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.core.errors import InputError
from jaxtrain.data import LabelledText, Series
from jaxtrain.experiment import config_text, override
from jaxtrain.experiment.setting_values import parse
from jaxtrain.optim import SGD

# Building the alphabet of all of Unicode would take two seconds.
TEXT = st.text(alphabet=[chr(code) for code in range(0x180)] + list("²٣漢😀\u2028\ud800"))
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False),
    str: TEXT,
    type(None): st.none(),
    Literal["auto", 1, True, None]: st.sampled_from(["auto", 1, True, None]),
}
UNIONS: dict[Any, st.SearchStrategy[Any]] = {
    int | str: SCALARS[int] | SCALARS[str],
    str | None: SCALARS[str] | st.none(),
    float | None: SCALARS[float] | st.none(),
    int | Literal["auto"]: SCALARS[int] | st.just("auto"),
    bool | str | None: st.booleans() | SCALARS[str] | st.none(),
    str | tuple[str, ...]: SCALARS[str] | st.lists(SCALARS[str], max_size=3).map(tuple),
    float | tuple[float, ...]: SCALARS[float] | st.lists(SCALARS[float], max_size=3).map(tuple),
}
ITEMS = SCALARS | UNIONS
PAIRS = [
    *ITEMS.items(),
    *((tuple[item, ...], st.lists(values, max_size=3).map(tuple)) for item, values in ITEMS.items()),
    *((list[item], st.lists(values, max_size=3)) for item, values in SCALARS.items()),  # type: ignore[valid-type]
    (tuple[int, str], st.tuples(SCALARS[int], SCALARS[str])),
    (tuple[()], st.just(())),
    (tuple[tuple[int, ...], ...], st.lists(st.lists(SCALARS[int]).map(tuple), max_size=3).map(tuple)),
    (tuple[tuple[str, float], ...], st.lists(st.tuples(SCALARS[str], SCALARS[float]), max_size=3).map(tuple)),
    (tuple[tuple[str, ...], str], st.tuples(st.lists(SCALARS[str]).map(tuple), SCALARS[str])),
]
# Characters that mean something in some place.
TEXTS = TEXT | st.text(alphabet="()[],'\"\\ \n019._-+eEinfat²٣")


def show(value: Any) -> str:
    """The text of a value in config.json."""
    Config = dataclasses.make_dataclass("Config", ["field"], frozen=True)
    return config_text(Config(value)).get("field", "") if not has_tuples(value) else repr(value)


def has_tuples(value: Any) -> bool:
    """config.json has an entry for each item of a tuple of tuples."""
    return isinstance(value, tuple | list) and any(isinstance(item, tuple | list) for item in value)


@pytest.mark.parametrize(("hint", "values"), PAIRS, ids=lambda pair: str(pair)[:60])
def test_recorded_text_is_read_as_the_same_value(hint: Any, values: st.SearchStrategy[Any]) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(values)
    def check(value: Any) -> None:
        found = parse(show(value), hint)
        assert found == value
        if not isinstance(value, float):  # 20.0 is recorded as 20
            assert type(found) is type(value)

    check()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TEXTS)
def test_any_text_is_read_or_refused_by_every_type(text: str) -> None:
    for hint, _ in PAIRS:
        try:
            value = parse(text, hint)
        except ValueError:
            continue
        if hint is str:
            assert value == text or text.strip()[0] in "'\""
        if hint in (int, float):
            assert text.isascii() and not math.isnan(value)


@dataclasses.dataclass(frozen=True)
class Mine:
    """A class that checks a field with an error of Python."""

    number: int = 3
    rate: float | SGD = 0.1
    names: Any = ("a", "b")
    parts: tuple[Series, ...] = (Series(),)

    def __post_init__(self) -> None:
        if self.number > 9:
            raise ValueError("number\nis too large")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["number", "rate", "names", "parts", "parts.0.rows", "parts.²", ""]), TEXTS)
def test_any_setting_is_applied_or_refused_in_one_line(path: str, text: str) -> None:
    for setting in (text, f"{path}={text}", f"{text}={path}"):
        try:
            override(Mine(), [setting])
        except InputError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("T (degC)", tuple[str, ...], ("T (degC)",)),
        ("wind[ms]", tuple[str, ...], ("wind[ms]",)),
        ("p (mbar),T (degC)", tuple[str, ...], ("p (mbar)", "T (degC)")),
        ("(T),p", tuple[str, ...], ("(T)", "p")),
        ("[a].txt,[b].txt", tuple[str, ...], ("[a].txt", "[b].txt")),
        ("(a,b", tuple[str, ...], ("(a", "b")),
        ("('Temp, °C', p)", tuple[str, ...], ("Temp, °C", "p")),
        ("rock'n'roll,'tis", tuple[str, ...], ("rock'n'roll", "'tis")),
        ("0,1", tuple[str, ...], ("0", "1")),
        ("2019,2020,", tuple[str, ...], ("2019", "2020")),
        ("1e3,True,none", tuple[str, ...], ("1e3", "True", "none")),
        ("1_2", str, "1_2"),
        ("007", str | None, "007"),
        ("data (1).csv", str | None, "data (1).csv"),
        ("None", str | None, None),
        ("'None'", str | None, "None"),
        (" +1_000 ", int, 1000),
        ("1e3", float, 1000.0),
        ("inf", float, math.inf),
        ("5", int | str, 5),
        ("'5'", int | str, "5"),
        ("1", float | tuple[float, ...], 1.0),
        ("1,2", float | tuple[float, ...], (1.0, 2.0)),
        ("(1)", float | tuple[float, ...], (1.0,)),
        ("a,b", str | tuple[str, ...], "a,b"),
        ("(a,b)", str | tuple[str, ...], ("a", "b")),
        ("(1,2),(3,)", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ("((1,2),[3])", tuple[tuple[int, ...], ...], ((1, 2), (3,))),
        ("64,x,0.5,true", tuple, (64, "x", 0.5, True)),
    ],
)
def test_text_is_read_by_the_type_of_the_field(text: str, hint: Any, value: Any) -> None:
    found = parse(text, hint)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1e3", int),
        ("0x10", int),
        ("٣", int),
        ("٣", float),
        ("9" * 5000, int),
        ("1e400", float),
        ("nan", float),
        ("1/3", float),
        ("'1'", int),
        ("yes", bool),
        ("1", bool),
        ("", int),
        ("", tuple[int, ...]),
        ("", tuple[str, ...]),
        ("a,,b", tuple[str, ...]),
        (",", tuple[str, ...]),
        ("1,2", tuple[int, int, int]),
        ("1,2", tuple[tuple[int, ...], ...]),
        ("(1,2", tuple[int, ...]),
        ("(1,2]", tuple[int, ...]),
        ("'\\x'", str),
    ],
)
def test_text_that_is_no_such_value_is_refused(text: str, hint: Any) -> None:
    with pytest.raises(ValueError):
        parse(text, hint)


def test_setting_of_columns_and_files_keeps_names_as_they_are() -> None:
    assert override(Series(), ["columns=T (degC)"]).columns == ("T (degC)",)
    assert override(LabelledText(), ["files=2019,2020"]).files == ("2019", "2020")
    assert override(Mine(), ["names=1,2"]).names == ("1", "2"), "no annotation: the type of the value"
    with pytest.raises(InputError, match=r"^number=10: ValueError: number$"):
        override(Mine(), ["number=10"])
    with pytest.raises(InputError, match=r"^number=1{73}\.\.\. \(157 characters\): expected int, such as 3$"):
        override(Mine(), ["number=" + "1" * 149 + "x"])
    assert typing.get_type_hints(Mine)["rate"] == float | SGD
    assert override(Mine(), ["rate=1e-3"]).rate == 0.001
