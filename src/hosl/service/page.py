"""The live page, /metrics and /health: read-only, over the service's own TLS, with a client's token."""

import json
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hosl.errors import AccessError, ConfigError
from hosl.service.access import Access, bearer
from hosl.service.status import Status
from hosl.transport.join_line import address_of

_MOST_THREADS = 64
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Page:
    """An HTTP server of a few read-only paths, in threads of its own."""

    def __init__(
        self, address: tuple[str, int], access: Access, status: Status, context: ssl.SSLContext | None
    ) -> None:
        """Listen and serve at once.

        Raises:
            ConfigError: if the address cannot be listened on.
        """
        try:
            self._server = _Server(address, _handler(access, status))
        except OSError as cause:
            raise ConfigError(
                f"--page {address_of(*address)} cannot be listened on: {cause.strerror}"
            ) from cause
        self._server.context = context
        scheme = "https" if context else "http"
        self.url = f"{scheme}://{address_of(address[0], self._server.server_address[1])}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="hosl-page", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    context: ssl.SSLContext | None = None

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a thread is free; each visitor takes one."""
        return threading.active_count() < _MOST_THREADS

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(10)
        if self.context is not None:  # in the connection's own thread: a slow handshake holds up nobody
            request = self.context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore visitors that go away or speak no TLS."""


def _handler(access: Access, status: Status) -> type[BaseHTTPRequestHandler]:
    page = files("hosl.service").joinpath("page.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "hosl", ""

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if address.path == "/health":
                self._answer(
                    200 if status.ready else 503, b"ready\n" if status.ready else b"not ready\n", "text/plain"
                )
            elif address.path == "/":
                # no token needed: the page holds no data, its script fetches /state.json with the token
                self._answer(200, page, "text/html; charset=utf-8")
            elif address.path not in ("/metrics", "/state.json"):
                self._answer(404, b"there are /, /health, /metrics and /state.json\n", "text/plain")
            elif not self._allowed(parse_qs(address.query)):
                self._answer(401, b"a client's token is needed: Authorization: Bearer TOKEN\n", "text/plain")
            elif address.path == "/metrics":
                self._answer(200, status.exposition(), "text/plain; version=0.0.4; charset=utf-8")
            else:
                self._answer(200, json.dumps(status.state()).encode(), "application/json")

        def _allowed(self, query: dict[str, list[str]]) -> bool:
            token = bearer(self.headers.get("authorization", "")) or query.get("token", [""])[0]
            try:
                access.client_of(token)
            except AccessError:
                return False
            return True

        def _answer(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            for name, value in (
                ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
                ("Content-Security-Policy", _POLICY), ("X-Content-Type-Options", "nosniff"),
                ("Referrer-Policy", "no-referrer"),
            ):  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Write nothing: the service has its own log."""

    return Handler
