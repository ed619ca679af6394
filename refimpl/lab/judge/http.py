"""Requests to an endpoint that is not trusted: bounded in time, size and repetitions, and never sent on to another host."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from refimpl.lab.address import Address

MAX_BYTES = 64 << 20            # of an answer; twenty probabilities of a token take 2 kB
CONNECT_SECONDS = 10
MAX_WAIT, MAX_TRIES = 30, 5     # seconds between two tries of a busy endpoint, and how many there are
BUSY = (429, 503)
SAID = 200                      # characters of an endpoint's own words that are shown


class EndpointError(ValueError):
    """The endpoint gave no answer that can be used. One line."""

    def __init__(self, line: str, status: int | None = None, fatal: bool = False):
        super().__init__(line)
        self.status = status            # of the response, None where there was no whole one
        self.fatal = fatal or status in (401, 403)      # is there no sense in asking anything else?

    @property
    def is_refusal(self) -> bool:
        """Did the endpoint understand the request and refuse it, so that another form may be taken?"""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (401, 403, 429)


@dataclass
class Http:
    """Where the endpoint is. `timeout`: seconds for one whole answer; `pause` (tests) waits."""

    url: str
    api_key: str | None = None
    timeout: float = 300.0
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self):
        """Raises ValueError for an address that is none."""
        self._address = Address.of(self.url, "an endpoint")

    def get(self, path: str) -> object:
        """What a GET answers, as JSON. Raises EndpointError."""
        return self._until_free("GET", path, None)

    def post(self, path: str, fields: Mapping[str, object]) -> object:
        """What a POST answers, as JSON. Raises EndpointError."""
        return self._until_free("POST", path, json.dumps(fields).encode())

    def _until_free(self, method: str, path: str, body: bytes | None) -> object:
        for n in range(MAX_TRIES):
            status, headers, content = self._once(method, path, body)
            if status not in BUSY:
                return self._json(path, status, headers, content)
            if n + 1 < MAX_TRIES:
                self.pause(_seconds(headers.get("Retry-After"), 2.0 ** n))
        raise EndpointError(f"{self._address.where(path)}: busy: status {status} {MAX_TRIES} times in a row{_said(content)}", status,
                            fatal=True)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        connection = self._address.connection(min(CONNECT_SECONDS, self.timeout))
        headers = {"Accept-Encoding": "identity"} | ({"Content-Type": "application/json"} if body else {})
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        late = threading.Event()
        try:
            connection.connect()
            connection.sock.settimeout(self.timeout)

            def end(sock: socket.socket = connection.sock):     # a timeout of the socket does not end an answer that trickles
                late.set()
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            timer = threading.Timer(self.timeout, end)
            timer.daemon = True
            timer.start()
            try:
                connection.request(method, f"{self._address.path}{path}", body, headers)
                response = connection.getresponse()
                content = response.read(MAX_BYTES + 1)
                if len(content) <= MAX_BYTES and response.length:
                    raise http.client.IncompleteRead(content, response.length)
            finally:
                timer.cancel()
        except (OSError, http.client.HTTPException, ValueError) as error:
            late_too = late.is_set() or isinstance(error, TimeoutError)
            cut_short = isinstance(error, http.client.IncompleteRead) and not late_too
            raise EndpointError(f"{self._address.where(path)}: {self._in_words(error, late_too)}", fatal=not cut_short) from None
        finally:
            connection.close()
        if late.is_set():
            raise EndpointError(f"{self._address.where(path)}: {self._in_words(None, True)}", fatal=True)
        if len(content) > MAX_BYTES:
            raise EndpointError(f"{self._address.where(path)}: the answer has more than {MAX_BYTES >> 20} MiB; the rest was not read",
                                fatal=True)
        return response.status, response.headers, content

    def _in_words(self, error: Exception | None, late: bool) -> str:
        if late:
            return f"no whole answer within {self.timeout:g} s"
        if isinstance(error, ConnectionRefusedError):
            return "nothing listens there"
        if isinstance(error, http.client.IncompleteRead):
            return f"the answer stops after {len(error.partial)} bytes, before its end"
        if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError):
            return "the connection was closed without an answer"
        if isinstance(error, http.client.HTTPException):
            return f"this is no HTTP: {type(error).__name__} {str(error)[:80]!r}"
        return " ".join(str(error).split())[:SAID] or type(error).__name__

    def _json(self, path: str, status: int, headers: Mapping[str, str], content: bytes) -> object:
        where = self._address.where(path)
        if 300 <= status < 400:
            raise EndpointError(f"{where}: it redirects to {headers.get('Location', 'nowhere')[:SAID]!r}, which is not followed; give the "
                                "address that answers", status, fatal=True)
        if status != 200:
            raise EndpointError(f"{where}: status {status}{_said(content)}", status)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise EndpointError(f"{where}: the answer is no JSON: {content[:60]!r}") from None


def _seconds(retry_after: str | None, otherwise: float) -> float:
    """How long to wait: what the endpoint asks for in seconds, or `otherwise`, but not longer than MAX_WAIT."""
    try:
        asked = float(retry_after)
    except (TypeError, ValueError):
        asked = otherwise
    return min(max(asked, 0.0), MAX_WAIT) if asked == asked else otherwise


def _said(content: bytes) -> str:
    """The endpoint's own words about an error, after a colon."""
    try:
        body = json.loads(content[:MAX_BYTES])
        error = body.get("error", body) if isinstance(body, dict) else body
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        text = content[:SAID].decode(errors="replace")
    text = "".join(c if c.isprintable() else " " for c in text)
    return f": {' '.join(text.split())[:SAID]}" if text.strip() else ""
