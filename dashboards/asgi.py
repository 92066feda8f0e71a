"""The app as Streamlit's server runs it: its pages load what draws figures at once."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import streamlit as st
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from streamlit import file_util

from dashboards.views import TITLES

_STALE = ("content-length", "etag", "last-modified")  # what they say is of the page as it was


def early_figures(folder: Path) -> bytes:
    """The tag that loads the part of Streamlit's client that holds plotly; nothing where that part is not known."""
    found = list(folder.glob("static/js/PlotlyChart.*.js"))
    return b'<script type="module" src="./static/js/%s"></script>' % found[0].name.encode() if len(found) == 1 else b""


async def load_figures_early(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Add the tag to every page.

    A browser takes most of a second to compile plotly. By itself it begins when the first figure arrives; before, it
    waits for the server half of that time.
    """
    response = await call_next(request)
    if request.method != "GET" or not response.headers.get("content-type", "").startswith("text/html"):
        return response
    parts = [part async for part in cast(StreamingResponse, response).body_iterator]
    body = b"".join(bytes(part) for part in parts if not isinstance(part, str))
    tag = early_figures(Path(file_util.get_static_dir()))
    changed = Response(body.replace(b"</head>", tag + b"</head>", 1), response.status_code)
    changed.raw_headers = [(name, value) for name, value in response.raw_headers if name.decode() not in _STALE]
    changed.headers["content-length"] = str(len(changed.body))
    return changed


async def to_first_page(request: Request) -> Response:
    """Streamlit knows its first page by no name, and says of its own that it does not exist."""
    return RedirectResponse(f"/?{request.url.query}")


app = st.App(
    Path(__file__).with_name("app.py"),
    routes=[Route(f"/{next(iter(TITLES))}", to_first_page)],
    middleware=[Middleware(BaseHTTPMiddleware, dispatch=load_figures_early)],
)
