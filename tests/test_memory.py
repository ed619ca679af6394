"""What a model will take, counted by hand on small files, and what made-up machines have to give."""

import os
import platform
import subprocess
import sys
import tracemalloc

import numpy as np
import psutil
import pytest
from shapes import opened, random_model, write_model
from systems import V1, V2, put

import refimpl
from refimpl.formats.matrix import stored_bytes
from refimpl.host import available
from refimpl.loading.memory import COMPILER_BYTES, MemoryRefusal, Need, buffer_bytes, needed, refuse_unless_it_fits
from refimpl.model.weights import weights_from_gguf

GB = 10**9


def as_stored(file, config, n_ctx: int, kv_type) -> Need:
    """With weights as they lie in the file, 8 rows in a call."""
    return needed(weights_from_gguf(file, config), config, n_ctx, 8, kv_type, stored_bytes)


def without(file, *names: str) -> int:
    """Bytes of all tensors but these."""
    return sum(info.n_bytes for name, info in file.tensors.items() if name not in names)


def test_weights_are_all_that_products_use(moe, ple):
    # a layer's output scale is read into a number, rotations into angles: neither is held
    scales = {f"blk.{i}.layer_output_scale.weight" for i in range(12)} | {"rope_freqs.weight"}
    file, config = moe
    assert as_stored(file, config, 64, np.float32).weights == without(file, *scales) > 300_000     # an embedding that is the head too: once
    file, config = ple
    shared = {f"blk.{i}.attn_{part}.weight" for i in range(5, 10) for part in ("k", "v", "k_norm")}
    assert as_stored(file, config, 64, np.float32).weights == without(file, "per_layer_token_embd.weight", *shared, *scales)


def test_an_embedding_beside_a_head_is_only_looked_up_in(tmp_path, moe):
    def with_head(tensors):
        return [*tensors, ("output.weight", *next(rest for name, *rest in tensors if name == "token_embd.weight"))]
    path = write_model(tmp_path / "untied.gguf", random_model("26B-A4B"), "Q4_0", change=with_head)
    assert as_stored(*opened(path), 64, np.float32).weights == as_stored(*moe, 64, np.float32).weights


def test_a_backends_own_layout_counts(moe):
    file, config = moe
    taken = []
    need = needed(weights_from_gguf(file, config), config, 64, 8, np.float32, held=lambda matrix: taken.append(matrix) or 0)
    assert len({id(matrix) for matrix in taken}) == len(taken) == 1 + 6 * 11 - 1        # the full layer has no values of its own
    assert need.weights == 4 * (64 + 5 * (64 * 8 + 32 + 16) + (64 * 8 + 64 + 16))       # vectors, float32


def test_context_is_the_one_asked_for(moe):
    file, config = moe
    # blocks of 64: 5 sliding layers of 2 heads of 16, at most two blocks for a window of 7 and 8 rows; a full one of 1 head of 32; float32
    assert as_stored(file, config, 64, np.float32).cache == 8 * (5 * 2 * 16 * 64 + 32 * 64)
    assert as_stored(file, config, 500, np.float32).cache == 8 * (5 * 2 * 16 * 128 + 32 * 512)
    half = as_stored(file, config, 64, np.float16)
    assert half.cache == 4 * (5 * 2 * 16 * 64 + 32 * 64) and half.n_ctx == 64
    assert half.total == half.weights + half.cache + half.buffers == half.without_context + half.cache


@pytest.mark.parametrize("shape", ["12B", "26B-A4B", "E2B"])
def test_buffers_cover_what_a_forward_pass_takes_and_not_much_more(tmp_path, shape):
    """Peak of a call of 300 rows and its logits, without the first call, in which Python imports and fills its own caches."""
    model = refimpl.load(write_model(tmp_path / "m.gguf", random_model(shape), "Q4_0"), backend="reference")
    model.head(model.prefill([5, 6], model.new_cache(2)))
    cache = model.new_cache(300)
    tracemalloc.start()
    model.head(model.prefill([7] * 300, cache)[-1:])
    peak = tracemalloc.get_traced_memory()[1] - cache.n_bytes
    tracemalloc.stop()
    estimate = buffer_bytes(model.config, 300) - COMPILER_BYTES
    assert 1 < estimate / peak < 4, (estimate, peak)


# ---- what there is

MEMINFO = {"proc/meminfo": "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   16000000 kB\nHugePages_Total:  0"}


def test_the_machine_is_the_limit_without_groups(tmp_path):
    assert available(put(tmp_path, MEMINFO)) == 16_000_000 * 1024


def test_a_group_is_the_limit_and_its_file_pages_count_as_free(tmp_path):
    put(tmp_path, MEMINFO | V2 | {
        "sys/fs/cgroup/user/job/memory.max": "max", "sys/fs/cgroup/user/job/memory.current": str(3 * GB),
        "sys/fs/cgroup/user/memory.max": str(8 * GB), "sys/fs/cgroup/user/memory.current": str(5 * GB),
        "sys/fs/cgroup/user/memory.stat": f"anon {2 * GB}\nfile {3 * GB}\nactive_file {GB}\ninactive_file {GB}\nshmem {GB}"})
    assert available(tmp_path) == 5 * GB                   # 8 - 5 + 2: memory in tmpfs is no page that can be dropped
    put(tmp_path, {"sys/fs/cgroup/user/job/memory.high": str(4 * GB)})
    assert available(tmp_path) == GB
    put(tmp_path, {"sys/fs/cgroup/user/job/memory.max": str(2 * GB)})
    assert available(tmp_path) == 0


def test_a_group_of_version_1(tmp_path):
    put(tmp_path, MEMINFO | V1 | {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GB), "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GB),
        "sys/fs/cgroup/memory/memory.stat": f"active_file 5\ntotal_active_file {GB}\ntotal_inactive_file {GB // 2}"})
    assert available(tmp_path) == 2.5 * GB
    put(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"})          # its way to say: no limit
    assert available(tmp_path) == 16_000_000 * 1024


def test_another_system_is_asked_through_psutil(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 123})())
    assert available(tmp_path) == 123


def test_this_machine_has_some():
    assert 1 << 20 < available() <= psutil.virtual_memory().total


# ---- and where the two do not meet

def test_one_line_says_what_is_needed_and_what_helps():
    need = Need(weights=14 * GB, cache=6 * GB, buffers=GB // 2, n_ctx=200_000, held_as_float32={})
    refuse_unless_it_fits(need, need.total, "x.gguf")
    with pytest.raises(MemoryRefusal) as refusal:
        refuse_unless_it_fits(need, need.total - 1, "x.gguf")
    line = str(refusal.value)
    for words in ("x.gguf: needs 20.50 GB", "weights 14.00 GB", "6.00 GB for a context of 200000 tokens", "20.50 GB free", "context (-c)"):
        assert words in line
    with pytest.raises(MemoryRefusal, match="2.00 GB free; the weights alone are too much") as refusal:
        refuse_unless_it_fits(need, 2 * GB, "x.gguf")
    assert "-c" not in str(refusal.value) and isinstance(refusal.value, ValueError) and "\n" not in str(refusal.value)


def test_the_context_that_is_used_is_checked_not_only_the_one_at_load(moe, monkeypatch):
    """Loading makes sure of 4,096 tokens, or `n_ctx` of them; a longer text is refused before it begins, not by the system."""
    from refimpl.loading import model as loading
    from refimpl.model.cache import cache_bytes

    asked, (file, config) = [], moe
    monkeypatch.setattr(loading, "refuse_unless_it_fits", lambda need, have, path: asked.append(need.n_ctx))
    model = refimpl.load(file.path)
    refimpl.load(file.path, n_ctx=7)
    assert asked == [min(4096, config.n_ctx), 7]
    room = cache_bytes(config, 64, 512, model.backend.kv_type)
    monkeypatch.setattr(loading, "available", lambda: room)
    assert len(refimpl.generate(model, [5] * 20, max_new_tokens=44).ids) <= 44
    assert len(refimpl.generate(model, [5] * 20, max_new_tokens=1000, n_ctx=64).ids) <= 45
    with pytest.raises(MemoryRefusal, match=r"a context of 65 tokens needs .* GB, this machine has .* GB free; a smaller context"):
        refimpl.generate(model, [5] * 20, max_new_tokens=45)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of GNU's C library")
def test_freed_memory_comes_back_without_page_faults():
    """A layer's arrays, twenty times: in a process of its own, as the setting is for good."""
    code = """if True:
        import numpy as np, resource, sys
        from refimpl.host import keep_freed_memory
        if sys.argv[1] == "kept":
            keep_freed_memory()
        faults = []
        for _ in range(20):
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
            arrays = [np.ones(12 << 20, np.uint8) for _ in range(4)]        # more than GNU's own limit of what stays
            del arrays
        print(faults[-1] - faults[2])"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    kept, without = (int(subprocess.check_output([sys.executable, "-c", code, how], env=environment)) for how in ("kept", "without"))
    assert kept < 20 < without, (kept, without)
