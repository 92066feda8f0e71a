"""The data of figures and tables as named columns of one length, and as CSV. Streamlit-free."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def columns_of(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows as the named columns of a table, also where there is no row."""
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns of one length as CSV with a header."""
    stream = io.StringIO()
    writer = csv.writer(stream)  # ends lines with \r\n, and so quotes both in a text
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return stream.getvalue()
