"""What all pages share: state in the address, and tables to download."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from dashboards.address import MOST, from_query, to_query
from dashboards.columns import columns_of, csv_text
from dashboards.frame import escape, markdown_table
from hardware.files import UserError
from runtime.config import require


@dataclass(frozen=True)
class View:
    names: tuple[str, ...] = ("a",)
    batch: int = 1
    share: float = 0.5
    shown: bool = False
    label: str = "x"
    trial: int | None = None

    def __post_init__(self) -> None:
        require(self.batch >= 1, f"batch >= 1 must hold, but got {self.batch}")


views = st.builds(
    View,
    names=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    batch=st.integers(1, 10**9),
    share=st.floats(allow_nan=False),
    shown=st.booleans(),
    label=st.text(),
    trial=st.none() | st.integers(-MOST, MOST),
)


@given(views)
def test_an_address_gives_its_view_back(view: View) -> None:
    query = to_query(view)
    assert all(isinstance(text, str) for texts in query.values() for text in texts)
    assert from_query(View, query) == view


@pytest.mark.parametrize(
    "query, message",
    [
        ({"batches": ["1"]}, "unknown parameter of the address 'batches'; known: batch, label"),
        ({"batch": ["one"]}, "batch must be a int, but is 'one'"),
        ({"batch": ["1", "2"]}, "batch must be given once"),
        ({"batch": ["0"]}, "batch >= 1 must hold"),
        ({"shown": ["yes"]}, "shown must be a bool"),
        ({"trial": ["first"]}, "trial must be a int"),
        ({"trial": ["9" * 4300]}, "trial must be from -9007199254740991 to 9007199254740991, but is 9{80}$"),
        ({"batch": ["x" * 4300]}, "batch must be a int, but is 'x{79}$"),
    ],
)
def test_what_an_address_cannot_say(query: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_query(View, query)


@example([("\r", 0.0, None)])
@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False), st.none() | st.integers())))
def test_a_table_is_read_back(rows: list[tuple[str, float, int | None]]) -> None:
    text = csv_text(columns_of(("name", "value", "count"), rows))
    header, *found = csv.reader(io.StringIO(text, newline=""))
    assert header == ["name", "value", "count"]
    assert found == [[name, str(value), "" if count is None else str(count)] for name, value, count in rows]


def test_no_markdown_is_obeyed() -> None:
    assert escape("[x](http://a) *b* `c` $d$") == "\\[x\\]\\(http\\://a\\) \\*b\\* \\`c\\` \\$d\\$"


def test_a_short_table_keeps_its_cells() -> None:
    """Names come from files: a bar or a line in one would be another cell or row."""
    table = markdown_table({"a | b": ["x\ny|z", None], "share": [1234.56789, 2], "is": [True, False]})
    assert table.splitlines() == [
        "| a \\| b | share | is |",
        "| --- | ---: | ---: |",
        "| x y\\|z | 1,235 | True |",
        "|  | 2 | False |",
    ]


def two_pages() -> None:
    """An app whose second widget comes and goes."""
    import streamlit as st

    from dashboards.frame import key, remember, restore
    from tests.test_frame import View

    page = st.radio("page", ["one", "two"])
    if page == "two":
        st.write("another page")
        return
    restore(View, "one")
    batch = st.number_input("batch", min_value=1, key=key("one", "batch"))
    trial = st.session_state[key("one", "trial")]
    if batch < 10:
        trial = st.number_input("trial", key=key("one", "trial"), value=None, step=1)
    remember(View(batch=batch, trial=trial), "one")


@pytest.fixture
def page() -> Iterator[AppTest]:
    yield AppTest.from_function(two_pages, default_timeout=30)


def test_a_page_keeps_what_was_set(page: AppTest, tmp_path: Path) -> None:
    page.query_params["trial"] = "7"
    page.run()
    assert page.number_input(key="one-trial").value == 7
    page.number_input(key="one-batch").set_value(20).run()  # the other widget goes
    assert page.query_params["batch"] == "20"
    page.number_input(key="one-batch").set_value(3).run()  # and comes back, with its value
    assert not page.exception
    assert (page.number_input(key="one-batch").value, page.number_input(key="one-trial").value) == (3, 7)

    page.radio[0].set_value("two").run()
    page.query_params.clear()  # as the browser does where another page is opened
    page.radio[0].set_value("one").run()
    assert (page.number_input(key="one-batch").value, page.number_input(key="one-trial").value) == (3, 7)

    page.query_params["batch"] = "5"  # a link that is followed in the same session
    page.run()
    assert page.number_input(key="one-batch").value == 5
    page.query_params["n" * 5000] = "1"
    page.run()
    assert len(page.error[0].value) < 1200 and "known\\: batch" in page.error[0].value
    page.query_params.clear()
    page.query_params["batch"] = "-1"
    page.run()
    assert "batch \\>= 1 must hold" in page.error[0].value
    assert page.number_input(key="one-batch").value == 1
