"""Endpoints to judge: our own server with any model, and strangers that answer as they like."""

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from serving import on_a_port

from refimpl.decode.prefixes import Prefixes
from refimpl.lab.judge.http import Http
from refimpl.serve.engine import Engine
from refimpl.serve.scheduler import Scheduler


@contextlib.contextmanager
def served(model, n_ctx=1024, **settings):
    """The address of our server with this model."""
    engine = Engine(Scheduler(model, Prefixes(model, 1 << 28), n_ctx, most_running=6))
    try:
        with on_a_port(engine, **settings) as (url, _):
            yield url
    finally:
        engine.close()


@contextlib.contextmanager
def playing(answer):
    """The address of a server that calls `answer(method, path, body)` for each request: (status, headers, bytes)."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            status, headers, content = answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in ({"Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content)
            self.close_connection = True

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def raw(*pieces, hold=False):
    """The address of a socket that sends `pieces` to whoever connects; `hold`: it stays open then."""
    listening = socket.create_server(("127.0.0.1", 0))
    kept = []

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                kept.append(connection)
                connection.recv(65536)
                for piece in pieces:
                    connection.sendall(piece)
                if not hold:
                    connection.shutdown(socket.SHUT_RDWR)
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        for each in (listening, *kept):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Between(Http):
    """An Http whose answers are changed on their way: `change(path, fields, body)` gives the body. `ask`: changes what is asked."""

    def __init__(self, url, change=lambda path, fields, body: body, ask=lambda path, fields: fields):
        super().__init__(url, pause=lambda seconds: None)
        self.change, self.ask = change, ask

    def get(self, path):
        return self.change(path, None, super().get(path))

    def post(self, path, fields):
        asked = self.ask(path, dict(fields))
        return self.change(path, fields, super().post(path, asked))


