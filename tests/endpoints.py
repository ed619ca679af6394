"""Endpoints to judge: our own server with any model, and strangers that answer as they like."""

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from serving import on_a_port

from refimpl.decode.prefixes import Prefixes
from refimpl.lab.evaluate.divergence import keep
from refimpl.lab.judge.http import EndpointError, Http
from refimpl.model.tap import no_tap
from refimpl.serve.engine import Engine
from refimpl.serve.scheduler import Scheduler
from refimpl.text.prompt import encode_messages


@contextlib.contextmanager
def served(model, n_ctx=1024, projector=None, **settings):
    """The address of our server with this model."""
    engine = Engine(Scheduler(model, Prefixes(model, 1 << 28), n_ctx, most_running=6), projector)
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
        return self.change(path, fields, self.sent(path, self.ask(path, dict(fields))))

    def sent(self, path, fields):
        return super().post(path, fields)


class Continuing(Http):
    """An engine that continues ids with `model`, without a server. `tap` may change values on the way."""

    def __init__(self, model, tap=no_tap):
        super().__init__("http://127.0.0.1:1")
        self.model, self.tap = model, tap

    def continued(self, ids, n_new, n_top, seed):
        """Of every new token (id, its log-probability, [(id, log-probability) of the most probable])."""
        random, cache = np.random.default_rng(seed), self.model.new_cache(len(ids) + n_new)
        state_TD = self.model.prefill(ids, cache, self.tap)
        for _ in range(n_new):
            top, logprob_V = self.most_probable(state_TD[-1:], n_top)
            p_V = np.exp(logprob_V)
            i = int(random.choice(len(p_V), p=p_V / p_V.sum()))
            yield i, float(logprob_V[i]), top
            state_TD = self.model.prefill([i], cache, self.tap)

    def most_probable(self, state_1D, n_top):
        logit_V = self.model.head(state_1D)[0]
        kept = keep(logit_V, n_top)
        logprob_V = np.minimum(logit_V.astype(np.float64) - kept.log_sum, 0)
        return [(i, float(logprob_V[i])) for i in kept.id_K.tolist()], logprob_V


class VLLM(Continuing):
    """vLLM as its documents describe it: tokens by their ids, the chosen one listed whatever its rank, the prompt's own with
    `prompt_logprobs`. `echo`: an engine without a name instead, which names tokens by text and repeats the prompt.
    """

    def __init__(self, model, echo=False):
        super().__init__(model)
        self.echo = echo

    def get(self, path):
        found = {"/v1/models": {"data": [{"id": "m", "max_model_len": 512} | ({} if self.echo else {"owned_by": "vllm"})]},
                 "/version": {"version": "0.20"}}
        return found[path]

    def post(self, path, fields):
        if path == "/tokenize" and not self.echo:
            return {"tokens": self.prompt(fields) if "messages" in fields else self.model.tokenizer.encode(fields["prompt"], special=True)}
        if path != "/v1/completions" or ("prompt_logprobs" if self.echo else "echo") in fields:
            raise EndpointError("status 400: no", 400)
        ids, n_top = fields["prompt"], fields["logprobs"]
        steps = list(self.continued(ids, fields["max_tokens"], n_top, fields["seed"]))
        usage = {"completion_tokens": len(steps), "prompt_tokens": len(ids)}
        choice = {"text": self.model.tokenizer.decode([i for i, _, _ in steps], special=True), "finish_reason": "length"}
        if n_own := n_top if fields.get("echo") else fields.get("prompt_logprobs", 0):
            own = [(ids[0], None, None), *self.own(ids, n_own)]
            if self.echo:
                steps = [*own, *steps]
            else:
                choice["prompt_logprobs"] = [top and self.ranked(i, logprob, top) for i, logprob, top in own]
        choice["logprobs"] = {"tokens": [self.name(i) for i, _, _ in steps], "token_logprobs": [logprob for _, logprob, _ in steps],
                              "top_logprobs": [top and {self.name(t): p for t, p in [(i, logprob), *top]} for i, logprob, top in steps]}
        return {"choices": [choice], "usage": usage}

    def prompt(self, fields):
        template = self.model.file.metadata["tokenizer.chat_template"]
        return encode_messages(self.model.tokenizer, template, fields["messages"], tools=fields.get("tools"),
                               thinking=fields["chat_template_kwargs"]["enable_thinking"]).ids

    def own(self, ids, n_top):
        state_TD = self.model.prefill(ids, self.model.new_cache(len(ids)))
        for n, i in enumerate(ids[1:]):
            top, logprob_V = self.most_probable(state_TD[n:n + 1], n_top)
            yield i, float(logprob_V[i]), top

    def ranked(self, i, logprob, top):
        ranks = {t: (p, n) for n, (t, p) in enumerate(top, 1)}
        return {str(t): {"logprob": p, "rank": n, "decoded_token": "?"} for t, (p, n) in ({i: (logprob, 250)} | ranks).items()}

    def name(self, i):
        return self.model.tokenizer.decode([i], special=True) if self.echo else f"token_id:{i}"


class LlamaServer(Continuing):
    """llama-server as far as it continues ids: a token after which the text ends inside of a character is not listed, and its bytes are
    those of the next one. `native`: has it /completion, which tells all ids?
    """

    def __init__(self, model, native, tap=no_tap):
        super().__init__(model, tap)
        self.native = native

    def get(self, path):
        if path == "/v1/models":
            return {"data": [{"id": "m", "owned_by": "llamacpp"}]}
        raise EndpointError("status 404: no", 404)

    def post(self, path, fields):
        if path != ("/completion" if self.native else "/v1/completions"):
            raise EndpointError("status 404: no", 404)
        ids, n_top = fields["prompt"], fields["n_probs" if self.native else "logprobs"]
        n_new, spelled, sent, chosen, listed = fields["n_predict" if self.native else "max_tokens"], b"", 0, [], []
        for i, logprob, top in self.continued(ids, n_new, n_top, fields["seed"]):
            chosen.append(i)
            spelled += self.bytes_of(i)
            if not ends_inside(spelled):
                probable = [self.named(t, p, self.bytes_of(t)) for t, p in top]
                listed.append(self.named(i, logprob, spelled[sent:]) | {"top_logprobs": probable})
                sent = len(spelled)
        text = spelled.decode(errors="replace")
        if self.native:
            return {"content": text, "tokens": chosen, "completion_probabilities": listed, "tokens_evaluated": len(ids)}
        usage = {"completion_tokens": len(chosen), "prompt_tokens": len(ids)}
        return {"choices": [{"text": text, "logprobs": {"content": listed}, "finish_reason": "length"}], "usage": usage}

    def bytes_of(self, i):
        return b"" if i < 5 else self.model.tokenizer.bytes_of(i)

    def named(self, i, logprob, spelled):
        return {"id": i, "logprob": logprob, "token": spelled.decode(errors="replace"), "bytes": list(spelled)}


class MlxServer(Continuing):
    """mlx_lm.server 0.32 as far as it continues texts: probabilities are asked for as of a chat, at most 11, and what is listed as the
    chosen token is the first of a list without order.
    """

    def get(self, path):
        raise EndpointError("status 404: no", 404)

    def post(self, path, fields):
        if path != "/v1/completions" or not isinstance(fields["prompt"], str):
            raise EndpointError("status 404: text input must be of type `str`", 404)
        if fields.get("logprobs", True) is not True or fields.get("top_logprobs", 0) > 11:
            raise EndpointError("status 400: logprobs must be of type bool", 400)
        ids = self.model.tokenizer.encode(fields["prompt"])
        steps, listed = list(self.continued(ids, fields["max_tokens"], fields.get("top_logprobs", 1), fields["seed"])), []
        for _, _, top in steps:
            rows = [{"id": i, "token": self.model.tokenizer.token(i), "logprob": logprob} for i, logprob in reversed(top)]
            listed.append(rows[0] | {"top_logprobs": rows})
        text = self.model.tokenizer.decode([i for i, _, _ in steps])
        usage = {"completion_tokens": len(listed), "prompt_tokens": len(ids)}
        return {"choices": [{"text": text, "logprobs": {"content": listed}, "finish_reason": "length"}], "usage": usage}


def ends_inside(spelled):
    """Does a character begin at the end of these bytes that is not whole?"""
    def n_bytes(first):
        return 2 if 0xC0 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF8 else 1
    return any(n < n_bytes(byte) for n, byte in enumerate(reversed(spelled[-4:]), 1))
