"""Series from csv files as they are found: read right, or refused in one line that names the fix."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.data import Series
from jaxtrain.data.csv_table import CsvFormat
from jaxtrain.data.timestamps import check_order, is_time
from jaxtrain.experiment import override

RNG = np.random.default_rng(0)
VALUES = np.stack([10 + RNG.normal(size=40), 990 + RNG.normal(size=40)], axis=1).round(2)
START = datetime.datetime(2019, 12, 31, 6)
TIMES = [START + datetime.timedelta(hours=n) for n in range(40)]
ISO = "%Y-%m-%d %H:%M"


def lines(
    separator: str = ",", decimal: str = ".", time: str = ISO, header: str = "Date,T (degC),p"
) -> list[str]:
    rows = (
        separator.join([f"{when:{time}}", *(f"{value:.2f}".replace(".", decimal) for value in row)])
        for when, row in zip(TIMES, VALUES, strict=True)
    )
    return [header.replace(",", separator), *rows]


def series(
    path: Path, text: list[str] | str, encoding: str = "utf-8", end: str = "\n", **settings: Any
) -> Series:
    text = text if isinstance(text, str) else end.join(text) + end
    path.write_bytes(text.encode(encoding))
    return Series(window=3, horizon=1, file=str(path), **settings)


def assert_right(source: Series) -> None:
    """Windows, scale and names are those that NumPy computes."""
    train = VALUES[:24]
    np.testing.assert_allclose(source.mean, train.mean(0))
    np.testing.assert_allclose(source.std, train.std(0))
    expected = (VALUES - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(source.gather(np.array([2]))["series"][0], expected[2:5], rtol=1e-5, atol=1e-5)
    assert source.variables == ("T (degC)", "p")


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "comma": ({}, {}),
    "byte order mark and CRLF": ({}, {"encoding": "utf-8-sig", "end": "\r\n"}),
    "CR": ({}, {"end": "\r"}),
    "semicolon": ({"separator": ";"}, {"separator": ";"}),
    "decimal comma": ({"separator": ";", "decimal": ","}, {"separator": ";", "decimal": ","}),
    "tab": ({"separator": "\t"}, {"separator": "\t"}),
    "German dates": ({"time": "%d.%m.%Y %H:%M:%S"}, {}),
    "American dates": ({"time": "%m/%d/%Y %I:%M %p"}, {}),
    "dates without zeros": ({"time": "%-d/%-m/%y %-H:%M"}, {}),
    "fractions of a second": ({"time": "%Y-%m-%dT%H:%M:%S.%fZ"}, {}),
    "dates as digits": ({"time": "%Y%m%d%H%M"}, {"columns": ("T (degC)", "p")}),
}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_the_file(form: str, tmp_path: Path) -> None:
    written, settings = FORMS[form]
    assert_right(series(tmp_path / "a.csv", lines(**written), **settings))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "cp1252"])
def test_text_in_another_encoding_needs_its_name(encoding: str, tmp_path: Path) -> None:
    text = lines(header="Datum,Température,p")
    source = series(tmp_path / "a.csv", text, encoding)
    hint = "utf-16-le" if encoding == "utf-16-le" else "utf-16" if encoding == "utf-16" else "latin-1"
    with pytest.raises(InputError, match=rf"set encoding.*{hint}$") as raised:
        len(source)
    assert "\n" not in str(raised.value)
    named = override(source, [f"encoding={encoding}"])
    assert named.variables == ("Température", "p")
    np.testing.assert_allclose(named.mean, VALUES[:24].mean(0))


def test_spaces_quotes_and_empty_lines_at_the_end_do_not_matter(tmp_path: Path) -> None:
    text = [line.replace(",", " , ") for line in lines()]
    text[0] = '"Date", "T (degC)", "p"'
    assert_right(series(tmp_path / "a.csv", [*text, "", "  ", ""]))
    quoted = ['"' + line.replace(",", '","') + '"' for line in lines(header="Date,T (degC),p")]
    assert_right(series(tmp_path / "b.csv", quoted))
    named = series(tmp_path / "c.csv", lines(header='Date,"T, °C",p'), columns=("T, °C",))
    assert named.variables == ("T, °C",)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "semicolon": (lines(";"), {}, r"its only column .* is not numeric; it looks ';'-separated: set "),
    "semicolon and decimal comma": (lines(";", ","), {}, r"row 2: 3 cells for 1 .*: set separator=';'$"),
    "tab": (lines("\t"), {}, r"it looks tab-separated: set separator='\\t'$"),
    "wrong separator": (lines(), {"separator": ";"}, r"it looks ','-separated: set separator=','$"),
    "wrong separator, columns": (lines(";"), {"columns": ("p",)}, r"'p' is missing; .*set separator=';'$"),
    "decimal comma": (
        lines(";", ","), {"separator": ";"}, r"row 2, column 'T \(degC\)': '.*' is not .*: set decimal=','$"
    ),
    "decimal point": (lines(";"), {"separator": ";", "decimal": ","}, r"a decimal point: set decimal='\.'$"),
    "thousands": (['Date,T', 'a,"1,234.50"', "b,2"], {}, "write numbers without a thousands separator$"),
    "thousands and decimal comma": (
        ["Date;T", "a;1.234,50", "b;2"], {"separator": ";", "decimal": ","}, "without a thousands separator$"
    ),
    "underscore": (["Date,T", "a,1_2"], {}, "'1_2' is not a finite number: fill it in"),
    "other digits": (["Date,T", "a,１２"], {}, "is not a finite number"),
    "NA": (["Date,T", "a,NA"], {}, "'NA' is not a finite number: fill it in"),
    "question mark": (["Date,T", "a,?"], {}, r"'\?' is not a finite number"),
    "comment at the top": (["# logger 3", *lines()], {}, r"row 2: .* comments, such as row 1$"),
    "comment later": ([*lines(), "# end"], {}, r"row 42: 1 cells .* comments, such as row 42$"),
    "no names": (lines()[1:], {}, "row 1 looks like a row of numbers: add a line of column names above it"),
    "index of pandas": ([",0,1", "0,5,6", "1,6,5"], {}, r"row 1: column 1 has no name, .*\(index=False\)$"),
    "index of pandas, read again": (["Unnamed: 0,a", "0,5", "1,6"], {}, "column 1 has no name"),
    "named index": (["index,a", "0,5", "1,6"], {}, "column 'index' numbers the rows: it is no variable"),
    "separator at the end": (["a,b,", "1,2,", "2,3,"], {}, "column 3 has no name"),
    "dates as digits": (lines(time="%Y%m%d%H")[:3], {}, "'Date' holds times as numbers, such as 20191231"),
    "dates as numbers": (["day,T", "20190131,5", "20190201,6"], {}, "column 'day' holds times as numbers"),
    "seconds since 1970": (["ts,T", "1577836800,5", "1577840400,6"], {}, r"such as columns=T$"),
    "new to old": ([lines()[0], *lines()[:0:-1]], {}, "row 3, column .* run from new to old: reverse them$"),
    "shuffled": ([*lines()[:5], lines()[8], *lines()[5:8]], {}, r"row 7.*: sort the rows by time$"),
    "twice": ([*lines()[:5], *lines()[4:]], {}, "row 6, .* 09:00' is also the time of the row before"),
    "thousands, comma": (['Date,T', 'a,"1,234"', "b,2"], {}, "write numbers without a thousands separator$"),
    "no-break space": (["Date,T", "a,1\u00a0234"], {}, "write numbers without a thousands separator$"),
    "decimal comma in quotes": (['Date,T', 'a,"1,5"'], {}, "'1,5' is not a finite number: fill it in"),
    "time in the middle": (["T,Year,p", "5,2019,1", "6,2020,2"], {}, "'Year' holds times .* columns=T,p$"),
    "an id at the end": (["T,p,ID", "5,1,7", "6,2,7"], {}, "column 'ID' numbers the rows: .* columns=T,p$"),
    "time as text": (["Date,Time,T", "2020-01-01,18.00.00,5"], {}, r"'Time' holds times, such as 18\.00\.00"),
    "unsorted seconds": (["a,T", "1577836800,5", "1577840400,6", "1577836801,6"], {}, "'a' holds times as"),
    "nanoseconds": (["a,T", "1577836800000000000,5", "1577836801000000000,6"], {}, "'a' holds times as"),
    "empty lines only": ("\n\n", {}, "has no rows"),
    "one column with an empty line": ("T\n1\n\n3\n", {}, "row 3: an empty cell is not a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_right_is_refused_with_the_fix(case: str, tmp_path: Path) -> None:
    text, settings, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as raised:
        len(series(tmp_path / "a.csv", text, **settings))
    assert "\n" not in str(raised.value) and str(raised.value).startswith(str(tmp_path / "a.csv"))


def test_columns_select_what_would_be_refused_otherwise(tmp_path: Path) -> None:
    index = [f"{n},{a},{b}" for n, (a, b) in enumerate(VALUES)]
    source = series(tmp_path / "a.csv", [",0,1", *index], columns=("0", "1"))
    np.testing.assert_allclose(source.mean, VALUES[:24].mean(0))
    hours = [f"{when:%Y%m%d%H},{a},{b}" for when, (a, b) in zip(TIMES, VALUES, strict=True)]
    assert series(tmp_path / "b.csv", ["date,a,b", *hours], columns=("date",)).variables == ("date",)


def test_gaps_in_time_are_a_note(tmp_path: Path) -> None:
    text = lines()
    assert series(tmp_path / "a.csv", text).notes() == ()
    del text[10:12], text[20]
    (note,) = series(tmp_path / "b.csv", text).notes()
    assert note.endswith(
        "column 'Date': 2 steps are longer than the usual 1:00:00, the first before row 11: "
        "windows reach over these gaps"
    )
    months = ["month,T", *(f"{1949 + n // 12}-{n % 12 + 1:02d},{n * n}" for n in range(40))]
    assert series(tmp_path / "c.csv", months).notes() == ()


def test_times_that_are_not_read_are_a_note(tmp_path: Path) -> None:
    assert_right(series(tmp_path / "a.csv", ["", " ", *lines()]))
    source = series(tmp_path / "b.csv", lines(time="%d %b %Y %H"))
    assert_right(source)
    assert source.notes()[0].endswith(
        "b.csv: the order of 'Date' was not checked: '31 Dec 2019 06' is not a time that is read here"
    )
    text = lines()
    text[7] = text[7].replace("2019-12-31 12:00", "noon")
    assert "'noon' is not a time" in series(tmp_path / "c.csv", text).notes()[0]
    stations = ["station,T (degC),p", *(f"north,{a},{b}" for a, b in VALUES)]
    assert series(tmp_path / "d.csv", stations).notes() == ()


@pytest.mark.parametrize(
    "time", ["%Y-%m-%d,%H", "%d/%m/%Y,%H.00.00", "%Y-%m-%d,%I:%M %p", "%Y-%m-%d,%I %p", "%Y%m%d,%H"]
)
def test_dates_and_hours_in_two_columns_are_one_time(time: str, tmp_path: Path) -> None:
    text = lines(time=time, header="Date,Hour,T (degC),p")
    settings: Any = {"columns": ("T (degC)", "p")}
    source = series(tmp_path / "a.csv", text, **settings)
    assert_right(source)
    assert source.notes() == ()
    with pytest.raises(InputError, match=r"from new to old|is before the row above"):
        len(series(tmp_path / "b.csv", [text[0], *text[:0:-1]], **settings))


@pytest.mark.parametrize(
    ("texts", "rises"),
    [
        (["01/12/2019", "02/12/2019", "03/01/2020"], True),  # day first
        (["12/01/2019", "12/02/2019", "01/03/2020"], True),  # month first
        (["31.12.19 23:00", "01.01.20 00:00"], True),
        (["19-12-31", "20-01-01"], True),
        (["1/1/2020 11:30 AM", "1/1/2020 12:00 PM", "1/1/2020 1:00 PM"], True),
        (["2020-10-25 02:30+02:00", "2020-10-25 02:30+01:00"], True),  # the end of summer time
        (["2020-10-25 02:30", "2020-10-25 02:30"], False),
        (["2020-01-01 00:00:00.1", "2020-01-01 00:00:00.2"], True),
        (["2020-01-01 00:00:00.2", "2020-01-01 00:00:00.1"], False),
        (["1/2/2020", "1/10/2020", "1/9/2020"], False),
        (["2020-1-9", "2020-1-10"], True),
        (["2020/01/02", "2019/12/31"], False),
        (["d", "d", "c"], True),  # no times
    ],
)
def test_order_of_times(texts: list[str], rises: bool) -> None:
    numbers = range(2, 2 + len(texts))
    if rises:
        check_order("a.csv", "date", texts, numbers)
        return
    with pytest.raises(InputError, match=r"^a\.csv, row \d, column 'date': '"):
        check_order("a.csv", "date", texts, numbers)


def test_ids_are_no_times() -> None:
    for ids in (["12345678"] * 3, ["87654321", "12345678"], ["1234567890"] * 2):
        assert check_order("a.csv", "id", ids, [2, 3, 4]) is None


def test_a_name_with_digits_is_no_time() -> None:
    assert not any(map(is_time, ["1.5", "10.13", "2019.5", "sensor-1", "1-2-", "12:30", "-1.5e3", ""]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separator": ""}, "separator is '': give one character"),
        ({"separator": ";;"}, "separator is ';;': give one character"),
        ({"separator": "\n"}, "give one character"),
        ({"separator": ",", "decimal": ","}, "that is not the decimal sign"),
        ({"decimal": "'"}, "decimal is \"'\": give '.' or ','"),
        ({"encoding": "utf-99"}, "encoding is 'utf-99', which Python does not know"),
        ({"encoding": "rot13"}, "encoding is 'rot13', which Python does not know"),
    ],
)
def test_formats_that_no_file_has_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CsvFormat(**settings)
    with pytest.raises(InputError, match=message):
        Series(**settings)
