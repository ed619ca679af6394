"""How fast servers answer: total tokens a second and time to the first one, for one client and for several at once, servers in turn.

Any server with OpenAI's streamed /v1/completions and prompts of token ids (llama-server has both). The prompts of a round are new ones
of the same length, so that nothing is known beforehand; servers of a round get the same ones.
"""

from __future__ import annotations

import http.client
import json
import secrets
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from refimpl.lab.address import Address
from refimpl.progress import Progress, silent

TIMEOUT = 600           # seconds without a byte
FIRST_ID = 300          # ids below are bytes and special tokens


@dataclass(frozen=True)
class Plan:
    """What every round asks: `streams` clients at once, for each number of them, each with `n_prompt` tokens of its own and `n_new` new
    ones. Ids are drawn below `n_ids`, others in every run, as a server may remember those of an earlier one.
    """

    streams: tuple[int, ...] = (1, 4)
    n_prompt: int = 64
    n_new: int = 48
    repetitions: int = 3
    n_ids: int = 1024
    seed: int = field(default_factory=lambda: secrets.randbits(32))


@dataclass(frozen=True)
class Answer:
    """When the pieces of one answer came, in seconds after the round began. A piece is a token, but for tokens of half a character."""

    times: tuple[float, ...]


def servers_bench(urls: Sequence[str], plan: Plan, *, progress: Progress = silent) -> dict[str, object]:
    """{"plan", "rounds": [{url, streams, first_token: median seconds, tokens_per_second: all new tokens until the last, writing: those a
    second from when everybody had the first one to when somebody had the last one}], "medians": the same, one for each address and
    number of streams}.

    Raises ValueError for an address that is none, or a server that does not answer.
    """
    rng, rounds = np.random.default_rng(plan.seed), []
    with progress("answers", plan.repetitions * len(urls) * sum(plan.streams)) as advance:
        for _ in range(plan.repetitions):
            for n in plan.streams:
                prompts = rng.integers(FIRST_ID, plan.n_ids, (n, plan.n_prompt)).tolist()
                for url in urls:
                    rounds.append({"url": url, "streams": n} | _round(url, prompts, plan.n_new))
                    advance(n)
    keys = ("first_token", "tokens_per_second", "writing")
    medians = [{"url": url, "streams": n} | {key: statistics.median(r[key] for r in rounds if (r["url"], r["streams"]) == (url, n))
                                             for key in keys} for url in urls for n in plan.streams]
    return {"plan": asdict(plan), "rounds": rounds, "medians": medians}


def _round(url: str, prompts: Sequence[Sequence[int]], n_new: int) -> dict[str, float]:
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(url, prompt, n_new, began), prompts))
    return summary(answers)


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """The figures of a round."""
    times = sorted(time for answer in answers for time in answer.times)
    everybody = max(answer.times[0] for answer in answers)
    writing = [time for time in times if everybody < time <= min(answer.times[-1] for answer in answers)]
    return {"first_token": statistics.median(answer.times[0] for answer in answers), "tokens_per_second": len(times) / times[-1],
            "writing": len(writing) / (writing[-1] - everybody) if writing else 0.0}


def ask(url: str, prompt: Sequence[int], n_new: int, began: float) -> Answer:
    """One streamed answer of `n_new` tokens. Sampled: a random model's greedy text goes round in circles, and repeats are drafted. Raises
    ValueError, one line.
    """
    address = Address.of(url)
    fields = {"prompt": list(prompt), "max_tokens": n_new, "temperature": 1.0, "top_k": 40, "seed": 1, "stream": True}
    connection = address.connection(TIMEOUT)
    times = []
    try:
        connection.request("POST", f"{address.path}/v1/completions", json.dumps(fields), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{url}: status {response.status}: {response.read(300).decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data:") and b"[DONE]" not in line and _has_choice(line[5:]):
                times.append(time.perf_counter() - began)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: {error}") from None
    finally:
        connection.close()
    if len(times) < 2:
        raise ValueError(f"{url}: {len(times)} pieces of an answer of {n_new} tokens: it ended early, or is not streamed")
    return Answer(tuple(times))


def _has_choice(data: bytes) -> bool:
    try:
        return any(choice.get("finish_reason") is None for choice in json.loads(data)["choices"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
