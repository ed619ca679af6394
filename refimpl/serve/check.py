"""Does a server answer the same alone, beside others, and again? Asks any server that has OpenAI's /v1/completions."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from refimpl.lab.address import Address
from refimpl.progress import Progress, silent

TIMEOUT = 600           # seconds without a byte
N_NEW = 24              # tokens of an answer
WAYS = ("alone again", "beside others")


class ServerError(ValueError):
    """The server cannot be asked. One line."""


@dataclass(frozen=True)
class Server:
    """Where it is, and the key that it asks for."""

    address: Address
    api_key: str | None

    def ask(self, fields: Mapping[str, object], leave_after: int | None = None) -> dict[str, object] | None:
        """The answer to a completion; None where `leave_after` bytes were read of it and the rest is not wanted. Raises ServerError."""
        connection = self.address.connection(TIMEOUT)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        where = self.address.where("/v1/completions")
        try:
            connection.request("POST", f"{self.address.path}/v1/completions", json.dumps(fields), headers)
            response = connection.getresponse()
            body = response.read(leave_after)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{where}: {error}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"{where}: status {response.status}: {body[:300].decode(errors='replace')}")
        if leave_after is not None:
            return None
        try:
            return json.loads(body)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServerError(f"{where}: no completion: {body[:100]!r}") from None


def check_server(url: str, *, n: int = 8, model: str | None = None, api_key: str | None = None,
                 progress: Progress = silent) -> dict[str, object]:
    """Asks `n` questions of several lengths, greedy and sampled, three times: one after the other, when nobody has asked them before;
    again; and all at once in another order, among as many that nobody waits for. Compares texts and probabilities to the last digit.
    `model`: the request's field of that name, where the server asks for one.

    Returns {"ok", "url", "questions", "tokens", "differ": {way: questions that differ}, "first": the first difference or None}. Raises
    ServerError, and ValueError for an address that is none.
    """
    server, nonce, rng = Server(Address.of(url), api_key), secrets.token_hex(4), np.random.default_rng()
    asked_of = {} if model is None else {"model": model}
    asked = [_question(nonce, i) | asked_of for i in range(n)]
    with progress("answers", 3 * n) as advance:
        def ask(fields: Mapping[str, object]) -> dict[str, object]:
            choice = server.ask(fields)
            advance(1)
            return choice
        first, again = [ask(fields) for fields in asked], [ask(fields) for fields in asked]
        with ThreadPoolExecutor(2 * n) as pool:
            gone = [pool.submit(server.ask, _question(f"{nonce} other", i) | asked_of | {"stream": True}, int(rng.integers(1, 2000)))
                    for i in range(n)]
            futures = {int(i): pool.submit(ask, asked[i]) for i in rng.permutation(n)}
            together = [futures[i].result() for i in range(n)]
            for future in gone:
                future.result()
    differ = {way: [i for i in range(n) if _shown(answers[i]) != _shown(first[i])] for way, answers in zip(WAYS, (again, together))}
    return {"ok": not any(differ.values()), "url": url, "questions": n, "tokens": N_NEW * n, "differ": differ,
            "first": _first(differ, first, dict(zip(WAYS, (again, together))))}


def _question(nonce: str, i: int) -> dict[str, object]:
    """Nobody has asked it before: the nonce is where it begins."""
    lines = [f"{nonce} {i}", *(f"def function_{j}(x):\n    return x + {j * i}" for j in range(1, 1 + i * i % 29))]
    return {"prompt": "\n".join(lines) + "\ndef ", "max_tokens": N_NEW, "temperature": (0.0, 1.0, 0.7)[i % 3], "seed": i, "logprobs": 2}


def _shown(choice: Mapping[str, object]) -> tuple[object, ...]:
    return choice.get("text"), choice.get("logprobs"), choice.get("finish_reason")


def _first(differ: Mapping[str, Sequence[int]], first: Sequence[Mapping], others: Mapping[str, Sequence[Mapping]]) -> dict | None:
    for way, questions in differ.items():
        for i in questions:
            return {"question": i, "way": way, "at first": first[i], "then": others[way][i]}
    return None
