"""What the dashboard's server accepts, asked of the real one: from where, how much, whose name, and which paths."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from dashboards.asgi import early_figures
from dashboards.cli import server_options

ROOT = Path(__file__).parents[1]
SECONDS = 60
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a dashboard in a folder where a user's configuration asks for the opposite."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    (folder / ".streamlit").mkdir()
    (folder / ".streamlit" / "config.toml").write_text(
        "[server]\nmaxUploadSize = 300\nenableXsrfProtection = false\nenableCORS = false\nenableStaticServing = true\n"
    )
    command = [sys.executable, str(ROOT / "ridgepoint.py"), "dashboard", "--headless", "--port", str(port)]
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "RIDGEPOINT_HOME": str(folder)}
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SECONDS
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=20)
    said = (folder / "log").read_text()
    assert "Traceback" not in said and "without a password" not in said


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def ask(port: int, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Status and body of a request whose path is sent as it is written."""
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request(method, path, body or None, {k.replace("_", "-"): v for k, v in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_it_listens_on_loopback_only(port: int) -> None:
    """In Linux's own table of listening sockets: state 0A, this port, and the address 127.0.0.1 alone."""
    places = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                places.append(address.rpartition(":")[0])
    assert places == ["0100007F"]


@pytest.mark.parametrize(
    "path",
    [
        "/app/static/../../../../etc/passwd",
        "/app/static/cli.py",
        "/_stcore/../../../../etc/passwd",
        "/media/../../../../etc/passwd",
        "/component/x/../../../../etc/passwd",
        "/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "/..%5c..%5cetc%5cpasswd",
        "//etc/passwd",
        "/dashboards/cli.py",
    ],
)
def test_no_path_leads_out_of_what_is_served(port: int, path: str) -> None:
    """Refused, or the page itself, which is what every unknown path shows."""
    status, body = ask(port, path)
    assert b"root:" not in body and b"typer" not in body
    assert status in (400, 403, 404) or (status == 200 and b"<title>Streamlit" in body), (status, body[:100])


def test_every_page_loads_what_draws_figures_at_once(port: int, tmp_path: Path) -> None:
    """The file that the tag names is there, and holds plotly. Where Streamlit has no such file, there is no tag."""
    for path in ("/", "/tuning"):
        status, body = ask(port, path)
        (name,) = re.findall(rb'<script type="module" src="\./(static/js/PlotlyChart[^"]+)"', body)
        assert status == 200 and body.count(b"</head>") == 1
    status, library = ask(port, f"/{name.decode()}")
    assert status == 200 and b"plotly" in library and b"</head>" not in ask(port, "/_stcore/health")[1]
    assert early_figures(tmp_path) == b""


def test_the_first_page_is_found_by_its_name_too(port: int) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("GET", "/explore?batch=2&devices=h100-sxm")
    assert connection.getresponse().headers["Location"] == "/?batch=2&devices=h100-sxm"
    connection.close()


def test_other_sites_pages_are_refused(port: int) -> None:
    """A WebSocket drives the page: it is opened for this server's own names and for its own page alone."""
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    url = f"ws://127.0.0.1:{port}/_stcore/stream"
    for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        with connect(url, origin=origin):  # type: ignore[arg-type]
            pass
    with pytest.raises(InvalidStatus):
        connect(url, origin="https://example.org")  # type: ignore[arg-type]
    with socket.create_connection(("127.0.0.1", port)) as link, pytest.raises(InvalidStatus):
        connect(f"ws://evil.example:{port}/_stcore/stream", sock=link)  # a name that was made to lead here
    (allowed,) = json.loads(ask(port, "/_stcore/host-config")[1])["allowedOrigins"]  # not Streamlit's own sites
    assert allowed == f"http://127.0.0.1:{port}"
    assert "Access-Control-Allow-Origin" not in _headers(port, "/_stcore/health", "https://example.org")


def _headers(port: int, path: str, origin: str) -> dict[str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Origin": origin})
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return dict(reply.headers)


def test_uploads_are_small_and_come_from_the_page(port: int) -> None:
    from streamlit.proto.BackMsg_pb2 import BackMsg
    from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{port}/_stcore/stream", max_size=None) as page:
        message = BackMsg()
        message.rerun_script.query_string = ""
        page.send(message.SerializeToString())
        session = ""
        while not session:
            answer = ForwardMsg()
            answer.ParseFromString(page.recv(SECONDS))  # type: ignore[arg-type]
            session = answer.new_session.initialize.session_id
        path = f"/_stcore/upload_file/{session}/file"
        assert ask(port, path, "PUT", b"x")[0] == 403  # no token: another site's page, with this browser's cookie
        token = _token(port)
        sent = {"X_Xsrftoken": token, "Cookie": f"_streamlit_xsrf={token}"}
        assert ask(port, path, "PUT", _form(10), **sent, Content_Type=FORM)[0] == 204
        assert ask(port, path, "PUT", _form(MEGABYTE + 1), **sent, Content_Type=FORM)[0] == 413


FORM = "multipart/form-data; boundary=edge"


def _form(size: int) -> bytes:
    head = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.yaml"\r\n\r\n'
    return head + size * b"x" + b"\r\n--edge--\r\n"


def _token(port: int) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("GET", "/_stcore/health")
    reply = connection.getresponse()
    reply.read()
    connection.close()
    cookie = reply.headers["Set-Cookie"] or ""
    assert cookie.startswith("_streamlit_xsrf=") and "samesite=lax" in cookie.lower()
    return cookie.split(";")[0].partition("=")[2].strip('"')


def test_tracebacks_stay_in_the_servers_log_and_nobody_is_told_of_its_use() -> None:
    options = server_options("127.0.0.1", 8501, headless=True)
    assert {
        "--client.showErrorDetails=none",
        "--browser.gatherUsageStats=false",
        "--server.enableAgentApi=false",
    } <= set(options)


def test_listening_elsewhere_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And whoever reaches the server by whatever name may use it then."""
    from dashboards import cli

    started: list[list[str]] = []
    monkeypatch.setattr(cli, "_check_free", lambda host, port: None)
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append(command))
    cli.dashboard(port=8501, host="0.0.0.0", headless=True)
    assert "0.0.0.0:8501 can use this dashboard without a password" in capsys.readouterr().err
    assert not [word for word in started[0] if "allowedHosts" in word]
    cli.dashboard(port=8501, host="127.0.0.1", headless=True)
    assert "password" not in capsys.readouterr().err
    assert "--server.allowedHosts=127.0.0.1" in started[1]


def test_pandas_is_whole_before_the_first_page() -> None:
    """Plotly takes a half-imported one for the whole: a figure of one thread failed while another imported it."""
    program = (
        "import sys, streamlit.web.cli as cli; before = 'pandas' in sys.modules\n"
        "cli.main = lambda **_: print(before, hasattr(sys.modules['pandas'], 'Series'))\n"
        "import dashboards.serve as serve; serve.main()"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert found.stdout.split() == ["False", "True"], found.stderr
