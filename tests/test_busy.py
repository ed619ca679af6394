"""Leaving threads out: made-up waits and a clock that only the test moves; what Linux says of this process; a model's threads."""

import time

import numba
import pytest

import refimpl
from refimpl.kernels.cores import busy
from refimpl.kernels.cores.busy import EVERY, FEW, FIRST_PAUSE, LAST_PAUSE, Watch, waited

MACHINE = {     # name -> (threads, the share of the time that all threads together wait, by how many compute)
    "quiet": (4, lambda n: 0.02), "one core taken": (4, lambda n: 0.5 * (n > 3)), "two taken": (4, lambda n: 0.5 * max(n - 2, 0)),
    "all taken": (4, lambda n: 0.5 * n), "two cores, one taken": (2, lambda n: 0.5 * (n > 1)),
    "two cores, both taken": (2, lambda n: 0.5 * n)}
USED = {"quiet": 4, "one core taken": 3, "two taken": 2, "all taken": 4, "two cores, one taken": 1, "two cores, both taken": 2}


class Machine:
    """Threads that wait as `share` says, a computation of 50 ms after the other."""

    def __init__(self):
        self.now, self.ns = 0.0, {"1": 0, "2": 0}

    def watch(self):
        return Watch(lambda: dict(self.ns), lambda: self.now)

    def run(self, watch, n, share, seconds):
        """How many threads each computation had."""
        used = []
        for _ in range(round(seconds / 0.05)):
            used.append(watch.allowed(n))
            self.now += 0.05
            self.ns["1"] += int(share(used[-1]) * 0.05e9)
        return used


@pytest.mark.parametrize("name", MACHINE)
def test_most_of_the_time_as_many_threads_compute_as_have_cores(name):
    machine, (n, share) = Machine(), MACHINE[name]
    used = machine.run(machine.watch(), n, share, 120)
    assert used.count(USED[name]) > 0.9 * len(used) and set(used) <= set(range(1, n + 1))
    assert name != "quiet" or set(used) == {n}


def test_all_threads_come_back_and_the_next_program_is_noticed_as_soon():
    machine = Machine()
    watch, taken, free = machine.watch(), MACHINE["one core taken"][1], MACHINE["quiet"][1]
    assert machine.run(watch, 4, taken, 60)[-1] == 3
    assert 4 in machine.run(watch, 4, free, LAST_PAUSE + 1) and set(machine.run(watch, 4, free, 20)) == {4}
    used = machine.run(watch, 4, taken, FIRST_PAUSE + 3 * EVERY)
    assert used[:2] == [4, 4] and 3 in used[:6] and watch.pause <= 2 * FIRST_PAUSE


def test_trials_become_rarer():
    machine = Machine()
    used = machine.run(machine.watch(), 2, MACHINE["two cores, one taken"][1], 60)
    trials = [i * 0.05 for i in range(1, len(used)) if used[i] > used[i - 1]]
    gaps = [b - a for a, b in zip(trials, trials[1:])]
    assert gaps == sorted(gaps) and gaps[0] < 2 * FIRST_PAUSE + 0.5 and LAST_PAUSE <= gaps[-1] < LAST_PAUSE + 0.5


def test_prompts_have_all_threads():
    machine = Machine()
    watch = machine.watch()
    assert machine.run(watch, 4, MACHINE["one core taken"][1], 10)[-1] == 3
    assert [watch.allowed(4, rows) for rows in (1, FEW, FEW + 1)] == [3, 3, 4]


def test_one_thread_is_never_left_out_and_a_pause_is_no_evidence():
    machine = Machine()
    watch = machine.watch()
    assert set(machine.run(watch, 1, lambda n: 0.9, 5)) == {1}
    machine.ns["1"] += 10**12
    machine.now += 20
    assert watch.allowed(4) == 4
    machine.ns["3"] = 10**12                 # a thread that has not been there before
    machine.now += EVERY
    assert watch.allowed(4) == 4


@pytest.mark.parametrize("text", [None, "", "1", "1 x 2"])
def test_a_system_that_does_not_say_has_all_threads(tmp_path, text):
    if text is not None:
        (tmp_path / "tasks/7").mkdir(parents=True)
        (tmp_path / "tasks/7/schedstat").write_text(text)
    assert waited(tmp_path / "tasks") == {}
    now = iter(range(100))
    watch = Watch(lambda: waited(tmp_path / "tasks"), lambda: next(now) / 5)
    assert {watch.allowed(3) for _ in range(50)} == {3}


def test_nanoseconds_of_every_thread(tmp_path):
    for task, text in (("7", "10 20 30\n"), ("12", "1 2 3\n")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    assert waited(tmp_path) == {"7": 20, "12": 2}
    before, began = waited(), time.perf_counter_ns()
    assert all(0 <= ns - before.get(task, 0) < 10**15 for task, ns in waited().items()) and time.perf_counter_ns() > began


def test_a_model_computes_with_fewer_and_gives_the_same_bits(monkeypatch):
    model, seen = refimpl.load(threads=min(2, numba.config.NUMBA_NUM_THREADS)), []
    ids = [5, 6, 7]
    whole = model.logits(ids)
    monkeypatch.setattr(busy.WATCH, "allowed", lambda n, rows: seen.append((n, rows)) or 1)
    with model.backend.running(7):
        assert numba.get_num_threads() == 1
    assert (model.logits(ids) == whole).all() and seen == [(model.backend.threads, rows) for rows in (7, 3, 3)]
