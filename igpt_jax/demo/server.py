"""Serves the demo's page and draws for it; each row of pixels is sent as soon as it is drawn.

    GET  /            the page, which loads nothing from anywhere else
    GET  /model       facts about the model, JSON
    POST /complete    a picture file as body (or ?example=NUMBER); n, rows, temperature and seed in the query
    POST /sample      n, temperature and seed in the query

A POST answers with JSON lines as they come. The first line of /complete is what the model makes of the picture
(`picture`, `nats`, `classes`). Then come `{"row", "pixels"}`: rows of all drawings, from `row` on. The last line is
`{"done"}` or `{"error"}`. Pixels are base64 of uint8 RGB.

The server is made for one person. It answers only requests that name it by an IP address, localhost or its own host
name, so that a page of another site cannot reach it through a name of its own (DNS rebinding). It refuses requests that
such a page sends.
"""

import base64
import contextlib
import importlib.resources
import ipaddress
import json
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from igpt_jax.api import ImageModel
from igpt_jax.config import UserError
from igpt_jax.data.images import Unusable, decode
from igpt_jax.metrics.logging import say

MAX_UPLOAD = 2**25  # bytes of a picture file
MOST = 16  # drawings at once
LIKELIEST = 3  # classes that are shown
IDLE_SECONDS = 60  # after which a connection on which nothing moves is closed
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

Line = dict[str, Any]


class Refused(Exception):
    """A request that is not answered, with the HTTP status and the reason."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class Server(ThreadingHTTPServer):
    """The demo's server. Drawings take turns.

    Args:
      host, port: to listen on; port 0: any free one.

    Attributes:
      model: that draws; set it before `serve_forever`.
      example: gives a picture uint8 [Y, X, 3] by a number, for people who have none at hand; None: there are none.
      drawn: number of images so far.

    Raises:
      UserError: it cannot listen there.
    """

    daemon_threads = True  # the process ends in the middle of a drawing
    allow_reuse_port = False  # two demos on one port would share its connections
    model: ImageModel
    example: Callable[[int], np.ndarray] | None = None

    def __init__(self, host: str, port: int):
        self.host, self.drawn, self.turn = host.lower(), 0, threading.Lock()
        try:
            self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__(address, Handler)
        except (OSError, UnicodeError) as error:  # of a name that cannot be one
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"host={host!r}, port={port}: cannot listen there: {reason}. Choose "
                            "others; --config.port=0 takes a free port.") from None

    def server_bind(self) -> None:
        """The base class also looks up the host's name, which may take seconds without a network."""
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the page."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def is_named(self, host: str) -> bool:
        """Whether a Host header names this server: by an IP address, localhost, or the name that it listens on."""
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""
            return name in ("localhost", self.host) or bool(ipaddress.ip_address(name))
        return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints an error in a request, unless the browser has left."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            say(traceback.format_exc())

    def facts(self) -> Line:
        """What the page shows about the model, and the limits of its controls."""
        model = self.model
        return {"model": repr(model).removeprefix("ImageModel(").removesuffix(")"), "image_size": model.image_size,
                "classifier": model.classifier, "examples": self.example is not None, "most": MOST,
                "max_upload": MAX_UPLOAD, "guessing": model.guessing}

    def drawing(self, picture_YXC: np.ndarray | None, rows: int, n: int, **settings: Any) -> Iterator[Line]:
        """The lines of an answer: completions of a picture, or samples if it is None."""
        with self.turn:
            started = time.monotonic()
            if picture_YXC is not None:
                yield self._analysis(picture_YXC)
            images = self.model.complete_by_row(picture_YXC, rows, n, **settings)
            first = 0
            for row, drawn_1nYXC in enumerate(images, start=rows):
                yield {"row": first, "pixels": _encoded(drawn_1nYXC[0, :, first:row + 1])}
                first = row + 1
            self.drawn += n
            yield {"done": round(time.monotonic() - started, 2)}

    def _analysis(self, picture_YXC: np.ndarray) -> Line:
        classes = []
        if self.model.classifier:
            odds_K = self.model.probabilities(picture_YXC)[0]
            classes = [[self.model.class_names[k], round(float(odds_K[k]), 4)]
                       for k in np.argsort(-odds_K)[:LIKELIEST]]
        nats_YX = self.model.nats(picture_YXC, per_pixel=True)[0]
        return {"picture": _encoded(self.model.quantize(picture_YXC)), "nats": nats_YX.round(3).ravel().tolist(),
                "classes": classes}


class Handler(BaseHTTPRequestHandler):
    """One request. Every answer closes its connection (HTTP/1.0), so a stream needs no length."""

    timeout = IDLE_SECONDS
    server: Server

    def do_GET(self) -> None:
        try:
            self._check_sender()
            if self.path == "/":
                page = importlib.resources.files("igpt_jax.demo").joinpath("page.html").read_bytes()
                self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page)
            elif self.path == "/model":
                self._answer(HTTPStatus.OK, "application/json", json.dumps(self.server.facts()).encode())
            else:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        except Refused as refusal:
            self._refuse(refusal)

    def do_POST(self) -> None:
        try:
            self._check_sender()
            path, query = urlsplit(self.path).path, self._query()
            if path not in ("/complete", "/sample"):
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
            picture_YXC = self._picture(query) if path == "/complete" else None
            lines = self.server.drawing(picture_YXC, query.pop("rows") if path == "/complete" else 0, query.pop("n"),
                                        temperature=query["temperature"], seed=query["seed"])
        except Refused as refusal:
            return self._refuse(refusal)
        self._head(HTTPStatus.OK, "application/x-ndjson")
        with contextlib.closing(lines):
            for line in _with_errors(lines):
                self.wfile.write(json.dumps(line).encode() + b"\n")

    def _check_sender(self) -> None:
        """Raises Refused if the request comes from a page of another site."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not self.server.is_named(host):
            raise Refused(HTTPStatus.FORBIDDEN, f"this server is not {host!r}. Open it as localhost, by an IP address, "
                                                "or start it with --config.host=NAME")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(HTTPStatus.FORBIDDEN, f"requests from pages of {origin} are refused")

    def _query(self) -> dict[str, Any]:
        """The settings in the query. Raises Refused for one that cannot be used."""
        given, size = dict(parse_qsl(urlsplit(self.path).query)), self.server.model.image_size
        settings = {"n": (int, 1, MOST, 1), "rows": (int, 0, size - 1, size // 2), "temperature": (float, 0, 100, 1),
                    "seed": (int, 0, 2**32 - 1, 0), "example": (int, 0, 2**32 - 1, None)}
        found = {}
        for name, (kind, low, high, default) in settings.items():
            try:
                found[name] = kind(given[name]) if name in given else default
                if name in given and not low <= found[name] <= high:
                    raise ValueError
            except ValueError:
                raise Refused(HTTPStatus.BAD_REQUEST, f"{name}={given[name][:20]!r} must be a number from {low} to "
                                                      f"{high}") from None
        return found

    def _picture(self, query: dict[str, Any]) -> np.ndarray:
        """The picture uint8 [Y, X, 3] of a request. Raises Refused with the reason if it cannot be used."""
        if query["example"] is not None:
            if self.server.example is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there are no examples: the checkpoint's store is not here")
            try:
                return self.server.example(query["example"])
            except UserError as error:  # the store is damaged
                raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "no picture was sent")
        if int(length) > MAX_UPLOAD:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the file is larger than {MAX_UPLOAD >> 20} MiB")
        try:
            return decode(self.rfile.read(int(length)), self.server.model.image_size)
        except Unusable as reason:
            raise Refused(HTTPStatus.BAD_REQUEST, str(reason)) from None

    def _refuse(self, refusal: Refused) -> None:
        # Where a body is left unread, closing the connection would also drop the answer.
        length = self.headers.get("Content-Length", "")
        left = min(int(length) if length.isdecimal() else 0, 2 * MAX_UPLOAD)
        self._answer(refusal.status, "application/json", json.dumps({"error": str(refusal)}).encode())
        while left > 0 and (read := self.rfile.read1(min(left, 2**16))):
            left -= len(read)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
                   "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def version_string(self) -> str:
        """The Server header, without the versions of Python and of this program."""
        return "igpt_jax"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""


def _with_errors(lines: Iterator[Line]) -> Iterator[Line]:
    """The lines. A UserError ends them: its message is the last line."""
    try:
        yield from lines
    except UserError as error:
        yield {"error": str(error)}


def _encoded(pixels: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(pixels).tobytes()).decode()
