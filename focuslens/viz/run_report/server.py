"""Server of a growing report, for the browser of this machine only."""

from __future__ import annotations

import json
import logging
import os
import socketserver
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from focuslens.viz.run_report.live import LiveReport

__all__ = ["PORT", "ReportServer", "open_server"]

_LOG = logging.getLogger(__name__)

PORT = 8765
"""Port that is tried first if none is given."""

_HOST = "127.0.0.1"

_SECONDS = 1.0
"""Seconds between two looks at the result files."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".jsonl": "text/plain; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".png": "image/png",
}


class ReportServer(ThreadingHTTPServer):
    """Server of a growing report. Only this machine can reach it.

    Args:
        report: The report.
        port: Port to listen on; 0 for any free port.

    Raises:
        OSError: If the port is not free.
    """

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere, two servers could then share a port

    def __init__(self, report: LiveReport, port: int) -> None:
        self.report = report
        super().__init__((_HOST, port), _Handler)

    def server_bind(self) -> None:
        """Bind to the port, without the look-up of a name that HTTPServer would do."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOST, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Address of the report."""
        return f"http://{_HOST}:{self.server_port}/"

    def watch(self) -> None:
        """Build the report whenever result files change, until a keyboard interrupt."""
        while True:
            started = time.monotonic()
            self.report.refresh()
            # A long run has many changes, and its report takes long to build. A sixth of the time is enough for it.
            time.sleep(max(_SECONDS, 5 * (time.monotonic() - started)))


@contextmanager
def open_server(report: LiveReport, port: int | None = None) -> Generator[ReportServer]:
    """Context manager for a server that answers in other threads.

    Args:
        report: The report.
        port: Port to listen on; 0 for any free port. By default, :data:`PORT` is tried first, and then any free port.

    Raises:
        OSError: If the port is not free. The message names it.
    """
    server = _bound(report, port)
    thread = threading.Thread(target=server.serve_forever, name="report server", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def _bound(report: LiveReport, port: int | None) -> ReportServer:
    try:
        return ReportServer(report, PORT if port is None else port)
    except OSError as error:
        if port is None:
            return ReportServer(report, 0)
        raise OSError(
            f"port {port} cannot be used ({error.strerror}); name another one, or 0 for any free port"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """Answer a request for the page, its status, or a file."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self._answer()

    def _answer(self) -> None:
        report, address = self.server.report, unquote(urlsplit(self.path).path)
        # A page of another site, whose name leads to this machine, must not read results.
        if self.headers.get("Host") not in (
            f"{_HOST}:{self.server.server_port}",
            f"localhost:{self.server.server_port}",
        ):
            self._send(403, "text/plain", b"this server answers to 127.0.0.1 and localhost only\n")
        elif address == "/":
            self._send(200, _TYPES[".html"], report.html)
        elif address == "/status":
            self._send(200, _TYPES[".json"], json.dumps(report.status()).encode())
        elif (path := report.file(address)) is not None:
            self._send(200, _TYPES[path.suffix], path.read_bytes())
        else:
            self._send(404, "text/plain", b"there is no such page\n")

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request as a detail."""
        _LOG.debug(format, *args)
