"""`bench --server`: how fast servers answer."""

import json

import pytest
from cli import assert_one_line, run
from serving import FakeEngine, on_a_port

from refimpl.lab.bench.servers_bench import Answer, Plan, servers_bench, summary


def test_the_figures_of_a_round():
    """Two answers of three pieces. From 2 s, when both had their first, to 3 s, when one had its last: pieces at 2.5 and 3 s."""
    assert summary([Answer((1.0, 2.0, 4.0)), Answer((2.0, 2.5, 3.0))]) == {
        "first_token": 1.5, "tokens_per_second": 6 / 4, "writing": 2 / 1}
    assert summary([Answer((1.0, 1.5)), Answer((2.0, 3.0))])["writing"] == 0.0


def test_servers_take_turns():
    engines = FakeEngine("a b c d e f"), FakeEngine("a b c d e f")
    with on_a_port(engines[0]) as (first, _), on_a_port(engines[1]) as (second, _):
        result = servers_bench([first, second + "/v1"], Plan((1, 3), 4, 6, 2))
        turns = [(url, n) for n in (1, 3) for url in (first, second + "/v1")]
        assert [(r["url"], r["streams"]) for r in result["rounds"]] == turns * 2
        asked = [[request.ids for request in engine.requests] for engine in engines]
        assert sorted(asked[0]) == sorted(asked[1]) and len(asked[0]) == 8 and len({tuple(ids) for ids in asked[0]}) == 8
        assert all(r["tokens_per_second"] > 0 for r in result["medians"]) and len(result["medians"]) == 4
        code, out, err = run("bench", "--server", first, "--server", second, "--streams", "1,2", "-p", 4, "-n", 6, "-r", 1)
        assert code == 0 and out.count(first) == 2 and out.count(second) == 2 and "1.00" in out
        json.loads(run("bench", "--server", first, "-p", 4, "-n", 6, "-r", 1, "--json")[1])


@pytest.mark.parametrize("engine, words", [
    (FakeEngine("a"), "pieces of an answer of 6"), (FakeEngine("a", error=ValueError("no")), "status 400")])
def test_servers_that_do_not_answer(engine, words):
    with on_a_port(engine) as (url, _):
        assert_one_line(run("bench", "--server", url, "-p", 4, "-n", 6, "-r", 1), 1, words)


@pytest.mark.parametrize("more, status, words", [
    (["--server", "http://127.0.0.1:9", "-r", 1], 1, "refused"), (["--server", "localhost:8080"], 1, "no address"),
    (["--server", "http://127.0.0.1:9", "--streams", "1,x"], 1, "--streams 1,x"), (["--server", "http://127.0.0.1:9", "-n", 1], 2, "-n of"),
    (["--server", "http://127.0.0.1:9", "--streams", "0"], 2, "--streams of at least 1"),
    (["--server", "http://127.0.0.1:9", "--kernels"], 2, "--kernels")])
def test_odd_arguments(more, status, words):
    assert_one_line(run("bench", *more), status, words)
