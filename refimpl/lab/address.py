"""Where a server is. Imports nothing."""

from __future__ import annotations

import http.client
import urllib.parse
from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """A host and port, whether it speaks TLS, and what stands before /v1 in its paths."""

    host: str
    port: int
    tls: bool
    path: str

    @classmethod
    def of(cls, url: str, what: str = "a server") -> Address:
        """`url`: http://127.0.0.1:8080, with or without /v1. Raises ValueError for what is no address, of `what`."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is no address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
            raise ValueError(f"{url!r} is no address of {what}: expected http://127.0.0.1:8080")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        """A connection that is not open yet; `timeout`: seconds without a byte."""
        return (http.client.HTTPSConnection if self.tls else http.client.HTTPConnection)(self.host, self.port, timeout=timeout)

    def where(self, path: str) -> str:
        """A path there, for people."""
        return f"{self.host}:{self.port}{self.path}{path}"
