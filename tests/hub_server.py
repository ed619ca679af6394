"""A hub on this machine: the part of the Hugging Face protocol that downloads use, with faults to order, and processes that ask it."""

import hashlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`repos`: name -> {file: bytes}. Requests are recorded in `requests`: (method, path, headers). Large files are served by `store`."""

    def __init__(self, repos, store=None):
        self.repos, self.store, self.requests = repos, store, []
        self.private, self.gated, self.status = set(), set(), None        # names of repositories; a status for everything
        self.cut_after = []                     # bytes after which the next answers break off
        self.wrong_sha, self.lie_about_size = set(), {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def sha256(self, name, data):
        return "f" * 64 if name in self.wrong_sha else hashlib.sha256(data).hexdigest()

    def listing(self, repo):
        return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [
            {"rfilename": name, "size": len(data), "blobId": git_id(data)} |
            ({"lfs": {"sha256": self.sha256(name, data), "size": len(data), "pointerSize": 100}} if is_large(name) else {})
            for name, data in self.repos[repo].items()]}

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words):
                pass

            def answer(self, status, headers=(), body=b"", cut=None):
                self.send_response(status)
                for key, value in dict(headers).items():
                    self.send_header(key, value)
                if "Content-Length" not in dict(headers):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body if cut is None else body[:cut])
                    if cut is not None:
                        self.wfile.flush()
                        self.close_connection = True
                        self.connection.close()

            def fail(self, status, code):
                self.answer(status, {"X-Error-Code": code, "X-Error-Message": code})

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
                if hub.status is not None:
                    return self.answer(hub.status)
                words = path.strip("/").split("/")
                api = words[:2] == ["api", "models"]
                repo, rest = "/".join(words[2:4] if api else words[:2]), words[4:] if api else words[2:]
                if repo not in hub.repos or repo in hub.private and self.headers.get("Authorization") != "Bearer secret":
                    return self.fail(401, "RepoNotFound")
                if rest and rest[0] in ("revision", "resolve") and rest[1] not in ("main", COMMIT):
                    return self.fail(404, "RevisionNotFound")
                if api:
                    return self.answer(200, {"Content-Type": "application/json"}, json.dumps(hub.listing(repo)).encode())
                if repo in hub.gated:
                    return self.fail(403, "GatedRepo")
                name = "/".join(rest[2:])
                if name not in hub.repos[repo]:
                    return self.fail(404, "EntryNotFound")
                data = hub.repos[repo][name]
                tags = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                size = hub.lie_about_size.get(name, len(data))
                if not is_large(name):
                    return self.answer(200, tags | {"ETag": f'"{git_id(data)}"'}, data)
                tags |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{hub.sha256(name, data)}"', "ETag": '"pointer"'}
                if hub.store is not None:
                    return self.answer(302, tags | {"Location": f"{hub.store.url}/{repo}/resolve/main/{name}"})
                first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                if first:
                    tags["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                cut = hub.cut_after.pop(0) if hub.cut_after and self.command == "GET" else None
                tags["Content-Length"] = str(len(data) - first)
                self.answer(206 if first else 200, tags, data[first:], cut)
        return Handler


def is_large(name):
    return name.endswith((".gguf", ".safetensors"))


def git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# ---- processes that ask: huggingface_hub reads the environment when it is imported, so every one imports it anew, and nothing else

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["refimpl.cli", "refimpl.loading.hub", "httpx", "httpx2", "requests", "tqdm", "yaml"])


def elsewhere(environment, function, *args, largest_file=None):
    """(what `function(*args)` gives, what is said) in a process of its own with this environment. `largest_file`: its bytes."""
    here, there = FORKS.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as said:
        process = FORKS.Process(target=_called, args=(there, said.name, environment, largest_file, function, args))
        process.start()
        there.close()
        try:
            result = here.recv() if here.poll(120) else None
        except EOFError:                # it ended before
            result = None
        finally:
            process.join(5)
            process.kill()
        assert process.exitcode == 0, (process.exitcode, said.read().decode())
        return result, said.read().decode()


def _called(there, said, environment, largest_file, function, args):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(said, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    time.sleep = lambda seconds: None               # huggingface_hub waits a second between two tries
    there.send(function(*args))


def answers(specs, role):
    """What `local` answers for each, errors in words, and all warnings."""
    from refimpl import HubError
    from refimpl.loading.hub import local

    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for spec in specs:
            try:
                found.append(str(local(spec, role)))
            except HubError as error:
                found.append(error.__class__.__name__ + " " + str(error))
    return found, [str(w.message) for w in caught]


def commands(lines):
    """What `cli.run` gives for each line of arguments."""
    import cli

    return [cli.run(*line, stdin="hello\n") for line in lines]
