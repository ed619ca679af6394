"""`refimpl convert`: the files equal those of llama.cpp's converter, run with the bits of their directories, come whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli import files_of_at_most, run
from directories import save, save_w4a16, write_vocabulary
from few_layers import few_layers
from shapes import COMMON, SHAPES, V, prompt, random_drafter, random_model, reference, write_model

import refimpl
from refimpl.files.convert import convert
from refimpl.formats.checkpoint import CheckpointError
from refimpl.formats.gguf import open_gguf
from refimpl.formats.gguf_writer import write_gguf
from refimpl.formats.quants.codecs import dequantize, quantize
from refimpl.loading.open import RenamedCheckpoint

FILES = Path(__file__).parent / "files"
sys.path.insert(0, str(FILES))
from make_converted import CASES, LISTING, listing, make_directory  # noqa: E402

# see the docstring of files/convert.py
GUESSED = {"general.name", "general.size_label"}
KEPT = {"masked_embd_centroids.weight", "masked_embd_ordering", "gemma4-assistant.masked_embd_top_k"}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_llama_cpps_converter(tmp_path, case):
    source, target = make_directory(case, tmp_path), tmp_path / "out.gguf"
    convert(source, target, CASES[case][1])
    ours, theirs = listing(target), json.loads(LISTING.read_text())[case]
    assert {name: value for name, value in ours["tensors"].items() if name not in KEPT} == theirs["tensors"]
    keys = sorted((ours["keys"].keys() | theirs["keys"].keys()) - GUESSED - KEPT)
    assert {key: ours["keys"].get(key) for key in keys} == {key: theirs["keys"].get(key) for key in keys}


# ---- what a converted file computes

@pytest.fixture(scope="module")
def packed_moe(tmp_path_factory):
    """A W4A16 directory with experts one by one."""
    return save_w4a16(tmp_path_factory.mktemp("packed") / "moe", random_model("26B-A4B", **few_layers("26B-A4B")))


REFERENCE, KERNELS = ({"backend": "reference"},), ({"arithmetic": "exact"}, {"arithmetic": "q8"})


@pytest.mark.parametrize("packed, shape, engines", [
    pytest.param(packed, shape, (*REFERENCE, *KERNELS) if packed or shape != "26B-A4B" else REFERENCE, id=f"{packed}-{shape}")
    for packed in (False, True) for shape in SHAPES
] + [pytest.param(False, "26B-A4B", KERNELS, marks=pytest.mark.exhaustive, id="experts of BF16")])
def test_directory_and_file_give_the_same_bits(tmp_path, packed, shape, engines):
    hf = random_model(shape, seed=6, **few_layers(shape))
    folder = save_w4a16(tmp_path / "m", hf) if packed else save(tmp_path / "m", hf, torch.bfloat16, "100KB")
    done = convert(folder, tmp_path / "m.gguf")
    assert done["types"].keys() == ({"F32", "BF16", "Q4_0"} if packed else {"F32", "BF16"})
    assert done["tensors"] == sum(done["types"].values())
    ids = prompt(20)
    for options in engines:
        a, b = (refimpl.load(path, **options) for path in (folder, tmp_path / "m.gguf"))
        assert np.array_equal(a.logits(ids), b.logits(ids)), options
        assert a.config == b.config and a.tokenizer.end_of_generation == b.tokenizer.end_of_generation


def test_a_drafter_converted(tmp_path):
    drafter = random_drafter("E4B", n_centroid=20)
    target = reference(write_model(tmp_path / "m.gguf", random_model("E4B", **few_layers("E4B"))))
    drafter.save_pretrained(tmp_path / "d")
    with pytest.raises(CheckpointError, match="tokenizer.json is missing, and no engine loads a file without it"):
        convert(tmp_path / "d", tmp_path / "d.gguf")
    write_vocabulary(tmp_path / "d")
    convert(tmp_path / "d", tmp_path / "d.gguf")
    a, b = (refimpl.load_drafter(tmp_path / name, target) for name in ("d", "d.gguf"))
    assert a.config == b.config and refimpl.propose(target, a, prompt(9), 4) == refimpl.propose(target, b, prompt(9), 4)


def types_of(path) -> dict[str, str]:
    return {name: info.type for name, info in open_gguf(path).tensors.items()}


def test_types(tmp_path):
    """Rows of 256 where K types fit, 96 in ffn_down where they do not."""
    folder = save(tmp_path / "m", random_model("E2B", hidden_size=256, **few_layers("E2B")), torch.bfloat16)
    for kind, matrix, down, embedding in (("Q4_K", "Q4_K", "Q5_0", "Q6_K"), ("Q6_K", "Q6_K", "Q8_0", "Q6_K"),
                                          ("Q8_0", "Q8_0", "Q8_0", "Q8_0"), ("Q4_0", "Q4_0", "Q4_0", "Q6_K"), ("F16",) * 4, ("F32",) * 4):
        path = tmp_path / f"{kind}.gguf"
        done = convert(folder, path, kind)
        types = types_of(path)
        assert (types["blk.0.attn_q.weight"], types["blk.0.ffn_down.weight"], types["token_embd.weight"]) == (matrix, down, embedding)
        assert types["per_layer_model_proj.weight"] == (kind if kind in ("F16", "F32") else "BF16")
        assert {types[name] for name in ("output_norm.weight", "blk.0.layer_output_scale.weight", "rope_freqs.weight")} == {"F32"}
        assert open_gguf(path).metadata["general.file_type"] == {"Q4_K": 14, "Q6_K": 18, "Q8_0": 7, "Q4_0": 2, "F16": 1, "F32": 0}[kind]
        assert len(reference(path).logits(prompt(5))) == 5 and done["bytes"] == path.stat().st_size
    assert types_of(tmp_path / "Q4_K.gguf")["per_layer_token_embd.weight"] == "Q8_0"        # rows of 192


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_float32_is_rounded_as_torch_rounds(tmp_path, kind, dtype):
    hf = random_model("12B", **few_layers("12B"))
    convert(save(tmp_path / "m", hf), tmp_path / "m.gguf", kind)
    file = open_gguf(tmp_path / "m.gguf")
    for theirs, ours in (("model.embed_tokens", "token_embd"), ("model.layers.1.mlp.up_proj", "blk.1.ffn_up")):
        want = hf.state_dict()[f"{theirs}.weight"].to(dtype).view(torch.int16).numpy()
        assert np.array_equal(file.raw(f"{ours}.weight").view(np.int16), want)


def test_router_and_experts(tmp_path, packed_moe):
    convert(packed_moe, tmp_path / "m.gguf", "Q8_0")
    types = types_of(tmp_path / "m.gguf")
    assert types["blk.0.ffn_gate_inp.weight"] == "F32" and types["blk.0.ffn_gate_exps.weight"] == "Q8_0"


def test_a_gguf_file_converted(tmp_path):
    """The same as from the directory; in one step or two where nothing is lost on the way; keys are kept."""
    folder = save(tmp_path / "m", random_model("26B-A4B", hidden_size=256, **few_layers("26B-A4B")), torch.bfloat16)
    convert(folder, tmp_path / "auto.gguf")
    for kind in ("Q4_K", "Q4_0", "auto"):
        convert(folder, tmp_path / "one.gguf", kind)
        convert(tmp_path / "auto.gguf", tmp_path / "two.gguf", kind)
        assert listing(tmp_path / "one.gguf") == listing(tmp_path / "two.gguf")
    split = write_split(tmp_path, tmp_path / "auto.gguf")
    convert(split, tmp_path / "joined.gguf")
    assert listing(tmp_path / "joined.gguf") == listing(tmp_path / "auto.gguf")


def write_split(folder, path):
    """The model in two parts."""
    file = open_gguf(path)
    names = list(file.tensors)
    for number, part in enumerate((names[:20], names[20:])):
        keys = dict(file.metadata) if number == 0 else {"general.architecture": "gemma4"}
        keys |= {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        tensors = [(name, file.tensors[name].type, file.raw(name).view("<f4").reshape(file.tensors[name].shape)
                    if file.tensors[name].type == "F32" else file.raw(name)) for name in part]
        write_gguf(folder / f"s-{number + 1:05}-of-00002.gguf", keys, tensors)
    return folder / "s-00001-of-00002.gguf"


def test_q4_0_finds_the_grid_of_the_training(tmp_path, packed_moe):
    """Unpacked to bfloat16, as in the `-unquantized` releases, and converted: the packed weights, but for the rounding."""
    hf = random_model("26B-A4B", **few_layers("26B-A4B"))
    save_w4a16(tmp_path / "packed", hf)                 # gives hf the packed weights
    convert(tmp_path / "packed", tmp_path / "packed.gguf")
    convert(save(tmp_path / "plain", hf, torch.bfloat16), tmp_path / "plain.gguf", "Q4_0")
    a, b = (open_gguf(tmp_path / name) for name in ("packed.gguf", "plain.gguf"))
    for name in ("blk.0.ffn_down.weight", "blk.1.attn_q.weight", "blk.1.ffn_down_exps.weight"):
        assert a.tensors[name].type == b.tensors[name].type == "Q4_0"
        want, got = (dequantize(file.raw(name), "Q4_0") for file in (a, b))
        assert np.abs(got - want).max() <= 2.0**-8 * np.abs(want).max(), name
        assert np.array_equal(quantize(got, "BF16"), quantize(want, "BF16")), name


# ---- memory, and what goes wrong on the way

def write_large(folder, d: int, n_ff: int, n_layer: int = 8, n_vocab: int = V) -> int:
    """A dense bfloat16 directory of large layers, without torch; returns its size in bytes."""
    folder.mkdir()
    sizes = {"self_attn.q_proj": (4 * 64, d), "self_attn.k_proj": (64, d), "self_attn.v_proj": (64, d), "self_attn.o_proj": (d, 4 * 64),
             "mlp.gate_proj": (n_ff, d), "mlp.up_proj": (n_ff, d), "mlp.down_proj": (d, n_ff)}
    norms = {f"{name}_layernorm": (d,) for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")}
    norms |= {"self_attn.q_norm": (64,), "self_attn.k_norm": (64,)}
    shapes = {"model.embed_tokens.weight": (n_vocab, d), "model.norm.weight": (d,)}
    for i in range(n_layer):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in (sizes | norms).items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * int(np.prod(shape))]}
    text = json.dumps(header).encode()
    row = quantize(np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * np.float32(0.03), "BF16")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for first in range(0, n := 2 * int(np.prod(shape)), len(row)):
                file.write(row[:n - first].data)
    write_vocabulary(folder, n_vocab)
    (folder / "config.json").write_text(json.dumps(COMMON | dict(
        model_type="gemma4_text", hidden_size=d, head_dim=64, intermediate_size=n_ff, num_hidden_layers=n_layer, num_key_value_heads=1,
        layer_types=["sliding_attention"] * (n_layer - 1) + ["full_attention"], per_layer_config={str(n_layer - 1): {"head_dim": 64}},
        rms_norm_eps=1e-6, vocab_size=n_vocab)))
    return at


PEAK = """
import sys, threading
from refimpl.files import convert as converter
converter.CHUNK //= int(sys.argv[4])
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        stop.wait(0.002)
stop = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
converter.convert(sys.argv[1], sys.argv[2], sys.argv[3])
done = True
thread.join()
print(peak - start)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(directory, its size): 107 MB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    return folder, write_large(folder, 512, 4096)


@pytest.mark.parametrize("kind", ["auto", "Q8_0"])
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_memory_stays_far_below_the_size(tmp_path, large, kind, times):
    """Of 107 MB converted in chunks of a quarter, and of four times as much in whole chunks."""
    folder, n_bytes = large if times == 1 else (tmp_path / "large", write_large(tmp_path / "large", 1024, 8192))
    done = subprocess.run([sys.executable, "-c", PEAK, folder, tmp_path / "m.gguf", kind, str(4 // times**2)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert n_bytes > times**2 * 100e6 and (tmp_path / "m.gguf").stat().st_size > n_bytes * (0.5 if kind == "Q8_0" else 0.99)
    assert int(done.stdout) < 0.25 * n_bytes, f"{int(done.stdout) / 1e6:.0f} MB of {n_bytes / 1e6:.0f}"


def test_the_command(tmp_path, packed_moe):
    status, out, err = run("convert", packed_moe, "-o", tmp_path / "m.gguf", "--type", "q8_0")
    assert status == 0 and out.startswith(f"{tmp_path}/m.gguf: ") and "Q8_0" in out and err == ""
    status, out, err = run("convert", packed_moe, "-o", tmp_path / "n.gguf", "--json")
    assert json.loads(out)["types"] == {"F32": 28, "BF16": 1, "Q4_0": 19}


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interruption_leaves_nothing_behind(tmp_path, large, name, status):
    """Stopped after the first matrices. Q4_K takes so long to make that the signal comes before the end on any machine."""
    (tmp_path / "m.gguf").write_text("what was there before")
    run = subprocess.Popen([sys.executable, "-m", "refimpl", "convert", str(large[0]), "-o", str(tmp_path / "m.gguf"), "--type", "Q4_K",
                            "--force"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while run.poll() is None and not any(path.stat().st_size > 150_000 for path in tmp_path.glob(".m.gguf.*.tmp")):
        time.sleep(0.05)
    run.send_signal(getattr(signal, name))
    out, err = run.communicate()
    assert (run.returncode, out, err) == (status, b"", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and (tmp_path / "m.gguf").read_text() == "what was there before"


def test_a_full_disk(tmp_path, packed_moe):
    with files_of_at_most(100_000):
        status, _, err = run("convert", packed_moe, "-o", tmp_path / "m.gguf")
    assert status == 1 and not list(tmp_path.iterdir())
    assert err.startswith(f"refimpl: {tmp_path}/m.gguf: cannot be written, the disk is full (") and err.count("\n") == 1


def test_a_disk_known_to_be_too_small(tmp_path, packed_moe, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="0.00 GB are needed, 0.00 GB are free"):
        convert(packed_moe, tmp_path / "m.gguf")


@pytest.mark.parametrize("at", [0, 15, 43])
def test_a_fault_in_the_middle_leaves_nothing_behind(tmp_path, packed_moe, monkeypatch, at):
    raw, calls = RenamedCheckpoint.raw, []

    def fail(self, name):
        calls.append(name)
        if len(calls) > at:
            raise MemoryError
        return raw(self, name)

    monkeypatch.setattr(RenamedCheckpoint, "raw", fail)
    with pytest.raises(MemoryError):
        convert(packed_moe, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("source", "output", "kind", "expected"), [
    ("folder", "there", "auto", "there: is a folder; give the name of a file"),
    ("folder", "folder", "auto", "is a folder"),
    ("folder", "folder/model.safetensors", "auto", "model.safetensors: is the input itself; give another name"),
    ("file.gguf", "file.gguf", "auto", "file.gguf: is the input itself"),
    ("file.gguf", "link.gguf", "auto", "link.gguf: is the input itself"),
    ("s-00001-of-00002.gguf", "s-00002-of-00002.gguf", "auto", "s-00002-of-00002.gguf: is the input itself"),
    ("file.gguf", "nowhere/x.gguf", "auto", "nowhere/x.gguf: No such file or directory"),
    ("file.gguf", "x.gguf", "Q9", "unknown type 'Q9'; choose from auto, BF16, F16"),
    ("missing", "x.gguf", "auto", "missing: no such file"), ("there", "x.gguf", "auto", "config.json: no such file"),
])
def test_senseless_orders_get_one_line(tmp_path, packed_moe, source, output, kind, expected):
    shutil.copytree(packed_moe, tmp_path / "folder")
    (tmp_path / "there").mkdir()
    convert(packed_moe, tmp_path / "file.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "file.gguf")
    write_split(tmp_path, tmp_path / "file.gguf")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    status, out, err = run("convert", tmp_path / source, "-o", tmp_path / output, "--type", kind, "--force")
    assert status == 1 and err.count("\n") == 1 and expected in err and not out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
