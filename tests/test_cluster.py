"""Evaluations and sweeps on three processes, one of them killed: the same figures, to the last bit, and one line for what goes wrong."""

import json
import os
import pickle
import signal
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import cli
import pandas
import pytest
from endpoints import LlamaServer
from shapes import random_model, write_model

from refimpl.lab import cluster as module
from refimpl.lab.cluster import Cluster, ClusterError, connected
from refimpl.lab.compare import tolerance
from refimpl.lab.evaluate.evaluate import evaluate
from refimpl.lab.evaluate.evaluation import Cutting
from refimpl.lab.evaluate.logit_sources import identified, located, side_of
from refimpl.lab.evaluate.run_files import read_windows
from refimpl.lab.evaluate.sweep import Sweep, sweep
from refimpl.lab.evaluate.work import Workers
from refimpl.lab.judge.judge import collect, judge
from refimpl.lab.judge.work import team
from refimpl.progress import silent

TEXT = "def walk(top, names): yield the path of the name and then of the other\n" * 2


@pytest.fixture(scope="module")
def processes():
    with connected("local", 3, 1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def address(processes):
    return processes._client.scheduler.address


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_three_processes_one_of_them_killed_give_the_same_bits(ple, text, tmp_path, processes, address):
    side, pids, done = side_of("reference", None, ple[0].path), processes._client.run(os.getpid), []
    one = evaluate(side, [text], against=replace(side, arithmetic="q8"), output=tmp_path / "one.parquet", n_ctx=16, stride=6)

    @contextmanager
    def killing(what, total, unit=1):
        def step(n):
            done.append(n)
            if len(done) == 6:                                  # the first call is for what was done before
                os.kill(next(iter(pids.values())), signal.SIGKILL)
        yield step
    many = evaluate(side, [text], against=replace(side, arithmetic="q8"), output=tmp_path / "many.parquet", n_ctx=16, stride=6,
                    cluster=address, progress=lambda what, *rest: (killing if what == "tokens" else silent)(what, *rest))
    assert one["windows"] > 15 and len(done) == one["windows"] + 1 and sum(done) == one["tokens"], "the others took its windows, once each"
    assert many | {"output": ""} == one | {"output": ""} and one["comparison"]["kl_low"] > 0
    (_, _, alone), (about, _, shared) = (read_windows(tmp_path / f"{name}.parquet") for name in ("one", "many"))
    for a, b in zip(alone, shared):
        assert {key: value.tobytes() for key, value in a.columns.items()} == {key: value.tobytes() for key, value in b.columns.items()}
    assert about["sha256"] and json.loads(shared[0].machine)["versions"]["numpy"] and not list(tmp_path.glob("*.parts"))
    tokens = pandas.read_parquet(tmp_path / "many.parquet", columns=["document", "token", "nll"]).explode(["token", "nll"])
    assert len(tokens) == one["tokens"] and tokens.nll.mean() == pytest.approx(one["nll"])


class Backwards:
    """A cluster in this process: what it is given and gives travels as bytes, the last task first."""

    def each(self, function, tasks):
        for n, task in reversed(list(tasks)):
            yield n, pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(task)), 1)))

    def on_all(self, function):
        function()


@pytest.mark.parametrize("many", ["in another order", pytest.param("by three processes", marks=pytest.mark.exhaustive)])
def test_a_judgement_is_the_same(many, tmp_path, request, monkeypatch):
    """In another order: as three processes would be asked, which take a second each to load the kernels."""
    if many == "in another order":
        address = "tcp://a:1"
        monkeypatch.setattr(module, "connected", lambda *how: nullcontext(Backwards()))
    else:
        address = request.getfixturevalue("address")
    path = write_model(tmp_path / "m.gguf", random_model("12B", seed=2), "Q4_0")
    model = tolerance.judge(path)
    end, found = collect(LlamaServer(model, native=True), model, questions=("probabilities", "window"))
    with team(Workers(address), str(path)) as compute:
        shared = judge(end, found, model, compute=compute)
    alone = judge(end, found, model)
    assert shared.figures() == alone.figures() and alone.verdicts[2].figures["positions"] > 100


def test_a_sweep_is_one_table_that_pandas_reads(ple, text, tmp_path, address):
    """Of two types of `convert`, against what they were made from; on three processes as in one."""
    output = tmp_path / "table.parquet"
    plan = Sweep([str(ple[0].path)], [text], ["Q8_0", "F16"], ["reference"], None, Cutting(n_ctx=16, n_windows=4))
    first = sweep(plan, output, Workers(address))
    assert [row["error"] for row in first["rows"]] == [None, None] and not output.with_name("table.parquet.parts").exists()
    table = pandas.read_parquet(output)
    assert table.file.tolist() == ["ple-Q8_0.gguf", "ple-F16.gguf"] and table.kl.tolist() == [row["kl"] for row in first["rows"]]
    assert (table.kl > 0).all() and table.kl[0] > table.kl[1] and table.bits_per_weight[0] < table.bits_per_weight[1] < 20
    assert (table.against == "ple.gguf (reference, exact)").all() and (table.tokens_per_second > 0).all()
    assert table.sha256.nunique() == 2 and json.loads(table.machines[0])[0]["host"]
    again = sweep(plan, tmp_path / "again.parquet")
    for mine, theirs in zip(first["rows"], again["rows"]):
        assert {**mine, "tokens_per_second": 0, "machines": 0} == {**theirs, "tokens_per_second": 0, "machines": 0}


def test_what_fails_leaves_the_rest_of_a_sweep_alone(ple, moe, text, tmp_path, monkeypatch):
    from refimpl.lab.evaluate import measure

    original, output = measure.opened, tmp_path / "table.parquet"

    def opened(side, *rest):
        if side.path == moe[0].path:
            raise ValueError(f"{side.path}: is too large")
        return original(side, *rest)
    monkeypatch.setattr(measure, "opened", opened)
    args = ("sweep", ple[0].path, moe[0].path, "-f", text, "--engines", "reference", "-c", 16, "--chunks", 4, "-o", output)
    status, out, err = cli.run(*args)
    assert status == 1 and err == f"refimpl: {moe[0].path}: is too large\n" and "failed" in out and "perplexity" in out
    assert pandas.read_parquet(output).error.fillna("").tolist() == ["", f"{moe[0].path}: is too large"]
    monkeypatch.undo()
    status, out, err = cli.run(*args, "--force", "--json")
    assert status == 0 and err.startswith("note: resumed: ") and [row["error"] for row in json.loads(out)["rows"]] == [None, None]


def test_what_a_cluster_is_refused_for(processes, address, monkeypatch):
    for found, says in (({}, "no workers"), ({"tcp://b:1": "0.0.9"}, "tcp://b:1: has refimpl 0.0.9, here is 0.1.0"),
                        ({"tcp://b:1": None}, "tcp://b:1: has no refimpl, here is 0.1.0")):
        workers = {name: {"packages": {"refimpl": version}} for name, version in found.items()}
        versions = {"client": {"packages": {"refimpl": "0.1.0"}}, "workers": workers}
        with pytest.raises(ClusterError, match=says):
            module._check(SimpleNamespace(get_versions=lambda packages, v=versions: v), "tcp://a:1")
    with monkeypatch.context() as patch:
        patch.setattr(module, "code_hash", lambda: "0" * 16)
        with pytest.raises(ClusterError, match="source [0-9a-f]{16}, here it is 0{16}"), connected(address, 1, 1):
            pass
        patch.setattr(module, "CONNECT", "300ms")
        with pytest.raises(ClusterError, match="tcp://127.0.0.1:1: no Dask scheduler answers"), connected("tcp://127.0.0.1:1", 1, 1):
            pass
    nobody = Cluster(SimpleNamespace(nthreads=dict, cancel=list, submit=lambda *a, **b: None), "tcp://a:1")
    monkeypatch.setattr(module, "PATIENCE", -1)
    monkeypatch.setattr(nobody, "_wait", lambda futures: [])
    with pytest.raises(ClusterError, match="tcp://a:1: no process has been there"):
        list(nobody.each(print, [(0, 0)]))


def test_a_worker_without_the_file_or_with_another_one(ple, tmp_path):
    elsewhere = identified(side_of("reference", None, ple[0].path), hashed=True, near=False)
    assert located(elsewhere) == ple[0].path
    with pytest.raises(ValueError, match=f"{tmp_path}/x.gguf: no such file"):
        located(replace(elsewhere, name=str(tmp_path / "x.gguf")))
    with pytest.raises(ValueError, match=f"is another file: SHA-256 {elsewhere.sha256}, expected 0000"):
        located(replace(elsewhere, sha256="0" * 64))
    here = identified(elsewhere, hashed=False, near=True)
    os.utime(ple[0].path, ns=(1, 1))
    with pytest.raises(ValueError, match="has changed since the start"):
        located(here)


def test_the_command_line(text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for status, says, args in (
            (2, "-f FILE", ()), (1, "no text", ("-f", text, "-f", tmp_path / "empty.txt")),
            (2, "--jobs", ("-f", text, "-j", 2, "--cluster", "x")), (1, "unknown type 'Q9'", ("-f", text, "--types", "q9")),
            (1, "no such file", ("x.gguf", "-f", text)), (1, "choose from kernels", ("-f", text, "--engines", "x"))):
        cli.assert_one_line(cli.run("sweep", *args), status, says)
