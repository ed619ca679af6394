"""Models from a hub, against a server on this machine that speaks its protocol. Nothing here touches the internet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, ROOT, Hub, answers, commands, elsewhere
from shapes import random_model, write_model

from refimpl.loading.hub import SPEC, is_remote, local
from refimpl.loading.hub_files import HubError, chosen
from refimpl.loading.model import BUILT_IN
from refimpl.loading.projector import BUILT_IN_PROJECTOR


@pytest.fixture
def hub():
    servers = []

    def make(repos, **options):
        servers.append(Hub(repos, **options))
        return servers[-1]
    yield make
    for server in servers:
        server.close()


@pytest.fixture
def ask(tmp_path):
    """ask(hub, spec, ...) -> the answer for each in a process of its own, with a cache that stays; none may say anything else."""
    def run(server, *specs, warned=0, role="model", largest_file=None, **env):
        (found, warnings), said = elsewhere(environment(tmp_path, server.url, **env), answers, specs, role, largest_file=largest_file)
        assert said == "" and len(warnings) == warned and not any("\n" in line for line in found + warnings), (said, found, warnings)
        return found[0] if len(found) == 1 else found
    return run


def environment(folder, url, **env):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING")) and "proxy" not in key.lower()}
    return clean | {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": url, "NO_COLOR": "1", "NO_PROXY": "*"} | env


def gets(server, name):
    return [headers for method, path, headers in server.requests if method == "GET" and path.endswith(name)]


DATA = bytes(range(256)) * 4000             # 1 MB
SMALL = {"README.md": b"# model\n", "m-Q4_K_M.gguf": DATA, "m-Q8_0.gguf": b"8" * 50, "mmproj-F16.gguf": b"i", "MTP/mtp-m-Q4_0.gguf": b"d"}


# Which file --------------------------------------------------------------------------------------------------------------------

GOOGLE = ["README.md", "gemma-4-E2B_q4_0-it.gguf", "mmproj-gemma-4-E2B-it-bf16.gguf"]
UNSLOTH = ["m-BF16-00001-of-00002.gguf", "m-BF16-00002-of-00002.gguf", "m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-IQ4_NL.gguf",
           "mmproj-F16.gguf", "MTP/m-Q4_0-MTP.gguf", "MTP/m-Q8_0-MTP.gguf", "imatrix_unsloth.gguf"]
BF16 = UNSLOTH[:2]
FOLDER = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
          "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]


@pytest.mark.parametrize("spec, names, role, files", [
    ("hf:google/gemma-4-E2B-it-qat-q4_0-gguf", GOOGLE, "model", GOOGLE[1:2]),
    ("hf:google/gemma-4-E2B-it-qat-q4_0-gguf:Q4_0", GOOGLE, "model", GOOGLE[1:2]),
    ("hf:u/m-GGUF", UNSLOTH, "model", ["m-Q4_K_M.gguf"]),
    ("hf:u/m-qat-GGUF", UNSLOTH, "model", ["m-Q4_0.gguf"]),
    ("hf:u/m-GGUF:q4_0", UNSLOTH, "model", ["m-Q4_0.gguf"]),
    ("hf:u/m-GGUF:bf16", UNSLOTH, "model", BF16),
    ("hf:u/m-GGUF:UD-Q4_K_XL", UNSLOTH, "model", ["m-UD-Q4_K_XL.gguf"]),
    ("hf:u/m-GGUF:q4_k_xl", UNSLOTH, "model", ["m-UD-Q4_K_XL.gguf"]),
    ("hf:u/m-GGUF@refs/pr/1:Q4_0", UNSLOTH, "model", ["m-Q4_0.gguf"]),
    ("hf:u/m-GGUF:m-BF16-00001-of-00002.gguf", UNSLOTH, "model", BF16),
    ("hf:u/m-GGUF:m-BF16-00002-of-00002.gguf", UNSLOTH, "model", BF16),
    ("hf:u/m-GGUF:mmproj-F16.gguf", UNSLOTH, "model", ["mmproj-F16.gguf"]),
    ("hf:u/m-GGUF:Q8_0", UNSLOTH, "drafter", ["MTP/m-Q8_0-MTP.gguf"]),
    ("hf:u/m-GGUF:MTP/m-Q4_0-MTP.gguf", UNSLOTH, "model", ["MTP/m-Q4_0-MTP.gguf"]),
    ("hf:u/m-assistant-GGUF", ["m-assistant.gguf"], "drafter", ["m-assistant.gguf"]),
    ("hf:u/m-assistant-GGUF", ["m-assistant.gguf"], "model", ["m-assistant.gguf"]),
    ("hf:u/m", ["a-00001-of-00000.gguf"], "model", ["a-00001-of-00000.gguf"]),
    ("hf:u/m", ["x/y.gguf", "z.md"], "drafter", ["x/y.gguf"]),
    ("hf:u/m", [*FOLDER, "README.md", "original/params.json", "model.bin"], "model", sorted(FOLDER)),
    ("hf:google/gemma-4-E2B-it-qat-q4_0-gguf", GOOGLE, "projector", GOOGLE[2:]),
    ("hf:u/m-GGUF", UNSLOTH, "projector", ["mmproj-F16.gguf"]),
    ("hf:u/m-GGUF", [*UNSLOTH, "mmproj-BF16.gguf", "mmproj-F32.gguf"], "projector", ["mmproj-BF16.gguf"]),
    ("hf:u/m-GGUF:F32", [*UNSLOTH, "mmproj-BF16.gguf", "mmproj-F32.gguf"], "projector", ["mmproj-F32.gguf"]),
    ("hf:u/m", FOLDER, "projector", sorted(FOLDER)),
])
def test_which_files_are_taken(spec, names, role, files):
    assert chosen(spec, names, SPEC.fullmatch(spec)["what"], role, "the repository") == files


@pytest.mark.parametrize("spec, names, says, role", [(*case, "model") for case in (
    ("hf:u/m", ["a-Q8_0.gguf", "a-Q6_K.gguf"], "several; name one after a colon: there are a-Q6_K.gguf, a-Q8_0.gguf"),
    ("hf:u/m", ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "several"),
    ("hf:u/m:q4_0", ["a-Q4_0.gguf", "b-Q4_0.gguf"], "several"),
    ("hf:u/m:Q5_K_M", UNSLOTH, "no GGUF file of type Q5_K_M in the repository; there are MTP/m-Q4_0-MTP.gguf, "),
    ("hf:u/m:Q4", UNSLOTH, "no GGUF file of type Q4 "),
    ("hf:u/m:.*", UNSLOTH, "no GGUF file of type"),
    ("hf:u/m:other.gguf", ["a.gguf"], "no such file in the repository; there are a.gguf"),
    ("hf:u/m", ["a-00001-of-00003.gguf", "a-00002-of-00003.gguf"], "a-00003-of-00003.gguf is missing in the repository, one of 3 parts"),
    ("hf:u/m", ["model.bin", "config.json"], "no GGUF file in the repository, and no config.json with safetensors either"),
    ("hf:u/m:Q4_0", FOLDER, "no GGUF file in the repository"),
    ("hf:u/m", ["a-00001-of-99999.gguf"], "a-00002-of-99999.gguf is missing"),
    ("hf:u/m", [], "no GGUF file"),
)] + [
    ("hf:u/m", ["a-Q8_0.gguf"], "no projector (mmproj) in the repository; there are a-Q8_0.gguf", "projector"),
    ("hf:u/m", ["a-Q8_0.gguf", "mmproj-a.gguf", "mmproj-b.gguf"], "several; name one", "projector"),
    ("hf:u/m:Q8_0", ["a-Q8_0.gguf", "mmproj-a.gguf"], "no GGUF file of type Q8_0", "projector"),
])
def test_what_leaves_no_choice_is_refused(spec, names, says, role):
    with pytest.raises(HubError) as caught:
        chosen(spec, names, SPEC.fullmatch(spec)["what"], role, "the repository")
    assert str(caught.value).startswith(f"{spec}: ") and says in str(caught.value) and "\n" not in str(caught.value)


def test_paths_are_left_alone_and_bad_names_refused():
    assert local("x/y.gguf") == Path("x/y.gguf") and not is_remote("./hf:a/b") and local(Path("./hf:x").absolute()).name == "hf:x"
    for spec in ("hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/b:", "hf:/b", "hf:a/b@x@y:"):
        with pytest.raises(HubError, match="expected hf:owner/name") as caught:
            local(spec)
        assert spec in str(caught.value)


# Downloads ---------------------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_checked_once_and_there_without_network(hub, ask):
    server = hub({"u/m": dict(SMALL)})
    path = Path(ask(server, "hf:u/m"))
    assert path.read_bytes() == DATA and path.name == "m-Q4_K_M.gguf" and len(gets(server, "Q4_K_M.gguf")) == 1
    mark = next(path.parents[2].glob(".verified/*"))
    before = mark.stat().st_mtime_ns
    assert ask(server, "hf:u/m", f"hf:u/m@{COMMIT}:q4_k_m") == [str(path)] * 2
    assert len(gets(server, "Q4_K_M.gguf")) == 1 and mark.stat().st_mtime_ns == before
    n = len(server.requests)
    assert ask(server, "hf:u/m", "hf:u/m:Q4_K_M", f"hf:u/m@{COMMIT}", HF_HUB_OFFLINE="1") == [str(path)] * 3
    assert len(server.requests) == n
    missing, elsewhere = ask(server, "hf:u/m:Q8_0", "hf:u/other", HF_HUB_OFFLINE="1")
    assert "no GGUF file of type Q8_0 in the cache; there are m-Q4_K_M.gguf" in missing and "HF_HUB_OFFLINE" in elsewhere
    server.close()
    assert ask(server, "hf:u/m", warned=1) == str(path)           # a note says that the hub was not asked
    assert "no connection to http://127.0.0.1" in ask(server, "hf:u/other")


def test_a_cut_connection_is_resumed_where_it_broke_off(hub, ask):
    """huggingface_hub writes chunks of 10 MB, and asks for what comes after them."""
    data = DATA * 33
    server = hub({"u/m": {"m.gguf": data}})
    server.cut_after = [23_000_000, 5_000_000]
    assert Path(ask(server, "hf:u/m")).read_bytes() == data
    ranges = [headers.get("range") for headers in gets(server, "m.gguf")]
    assert len(data) > 33_000_000 and ranges == [None, f"bytes={2 * 10 * 2**20}-", f"bytes={2 * 10 * 2**20}-"]


def test_a_connection_that_keeps_breaking_leaves_nothing(hub, ask, tmp_path):
    server = hub({"u/m": dict(SMALL)})
    server.cut_after = [0] * 20
    answer = ask(server, "hf:u/m")
    assert "broke off again and again" in answer and "m-Q4_K_M.gguf" in answer
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 1000]
    server.cut_after = []
    assert Path(ask(server, "hf:u/m")).read_bytes() == DATA


def test_wrong_bytes_are_deleted_and_never_used(hub, ask, tmp_path):
    server = hub({"u/m": dict(SMALL)})
    server.wrong_sha.add("m-Q4_K_M.gguf")
    for _ in range(2):                                          # the second time it is downloaded again
        answer = ask(server, "hf:u/m")
        assert answer.startswith("HubError hf:u/m: m-Q4_K_M.gguf: its SHA-256 is not the one")
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 1000] and not list(tmp_path.rglob("*.gguf"))
    assert len(gets(server, "Q4_K_M.gguf")) == 2
    assert "not in the cache" in ask(server, "hf:u/m", HF_HUB_OFFLINE="1")
    server.wrong_sha.clear()
    server.lie_about_size["m-Q4_K_M.gguf"] = 900_000
    assert "another number of bytes" in ask(server, "hf:u/m") and not list(tmp_path.rglob("*.gguf"))


def test_a_file_that_changed_on_this_disk_is_checked_again(hub, ask):
    server = hub({"u/m": dict(SMALL)})
    path = Path(ask(server, "hf:u/m"))
    blob = path.resolve()
    blob.write_bytes(b"x" + DATA[1:])
    assert "SHA-256" in ask(server, "hf:u/m", HF_HUB_OFFLINE="1")
    assert not blob.exists()


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(hub, ask):
    store = hub({"u/m": dict(SMALL)})
    server = hub({"u/m": dict(SMALL)}, store=store)
    server.private.add("u/m")
    assert "private one, for which HF_TOKEN" in ask(server, "hf:u/m")
    assert "private one" in ask(server, "hf:u/m", HF_TOKEN="wrong")
    assert store.requests == []
    assert Path(ask(server, "hf:u/m", HF_TOKEN="secret")).read_bytes() == DATA
    assert server.requests[-1][2]["authorization"] == "Bearer secret"
    assert gets(store, "Q4_K_M.gguf") and not [headers for _, _, headers in store.requests if "secret" in str(headers)]


def test_every_refusal_of_the_server_is_one_line(hub, ask):
    server = hub({"u/m": dict(SMALL), "u/gated": dict(SMALL)})
    server.gated.add("u/gated")
    nothing, gated, revision, file = ask(server, "hf:u/nothing", "hf:u/gated", "hf:u/m@v9", "hf:u/m:other.gguf")
    assert "no such repository" in nothing and "terms accepted" in gated and "no such revision" in revision and "m-Q8_0.gguf" in file
    server.status = 503
    assert "status 503" in ask(server, "hf:u/m")
    server.status = 403
    assert "status 403" in ask(server, "hf:u/m")
    server.status = 204
    assert ask(server, "hf:u/m").startswith("HubError hf:u/m: ")       # no hub at all


def test_no_room_on_the_disk(hub, ask, tmp_path):
    class Huge(bytes):                                          # 10^17 bytes, it says
        def __len__(self):
            return 10**17
    assert "100000000.00 GB" in ask(hub({"u/m": {"m.gguf": Huge(b"x")}}), "hf:u/m")
    assert not (tmp_path / "hf" / "hub" / "models--u--m" / "snapshots").exists()
    answer = ask(hub({"u/m": dict(SMALL)}), "hf:u/m", largest_file=200 << 10)
    assert answer.startswith("HubError hf:u/m: m-Q4_K_M.gguf: ") and not list(tmp_path.rglob("*.gguf"))
    (tmp_path / "hf").chmod(0o500)
    if os.access(tmp_path / "hf", os.W_OK):                     # root may do anything
        return
    assert ask(hub({"u/m2": dict(SMALL)}), "hf:u/m2").startswith("HubError hf:u/m2: ")


def test_split_files_and_folders_come_whole(hub, ask):
    parts = {f"s-0000{i}-of-00003.gguf": bytes([i]) * 1000 for i in (1, 2, 3)}
    folder = {name: name.encode() for name in FOLDER}
    server = hub({"u/split": parts, "u/folder": folder | {"README.md": b"r", "x.bin": b"b"}, "u/both": dict(SMALL)})
    split, path, again = ask(server, "hf:u/split", "hf:u/folder", "hf:u/folder")
    assert Path(split).name == "s-00001-of-00003.gguf" and {p.name for p in Path(split).parent.iterdir()} == set(parts)
    assert path == again and {p.name: p.read_bytes() for p in Path(path).iterdir()} == folder
    assert ask(server, "hf:u/folder", "hf:u/split", HF_HUB_OFFLINE="1") == [path, split]
    assert Path(ask(server, "hf:u/both", role="drafter")).name == "mtp-m-Q4_0.gguf"


# As a user meets it ------------------------------------------------------------------------------------------------------------


def test_every_command_takes_it(hub, tmp_path):
    model = write_model(tmp_path / "small.gguf", random_model("12B")).read_bytes()
    server = hub({"u/m": {"small-Q4_0.gguf": model, "other-Q8_0.gguf": b"GGUF?"}})
    model = ("-m", "hf:u/m:Q4_0", "--backend", "reference")
    results, said = elsewhere(environment(tmp_path, server.url), commands, [
        ("inspect", "-m", "hf:u/m:Q4_0", "--json"), ("generate", *model, "-p", "ab", "-n", "3", "--json"),
        ("bench", *model, "-p", "4", "-n", "2", "-r", "1", "--json"), ("chat", *model),
        ("generate", "-p", "x", "-m", "hf:u/m:Q9"), ("inspect", "-m", "hf:u/m:Q9"),
        ("generate", "-p", "x", *model, "--draft", "hf:u/none"), ("inspect", "-m", "hf:u/m:Q8_0")])
    inspected, generated, measured, chatted, *refused, without_drafter, broken = results
    assert said == "" and len(refused) == 2
    code, out, err = inspected
    assert code == 0 and json.loads(out)["model"]["n_vocab"] == 300 and err == ""
    code, out, err = generated
    assert code == 0 and len(json.loads(out)["ids"]) == 3 and err == ""
    assert measured[0] == 0
    code, out, err = chatted
    assert code == 1 and "no chat template" in err
    for code, out, err in refused:
        assert (code, out) == (1, "") and err == ("refimpl: hf:u/m:Q9: no GGUF file of type Q9 in the repository; there are "
                                                  "other-Q8_0.gguf, small-Q4_0.gguf\n"), err
    code, out, err = without_drafter
    assert code == 1 and "no such repository" in err and err.count("\n") == 1
    code, out, err = broken
    assert code == 1 and "other-Q8_0.gguf: byte 4: expected" in err and err.count("\n") == 1


def test_a_picture_finds_the_projector_in_the_repository_of_the_model(hub, tmp_path):
    from PIL import Image

    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    model = BUILT_IN.read_bytes()
    server = hub({"u/m": {"m-Q4_0.gguf": model, "mmproj-m-F16.gguf": BUILT_IN_PROJECTOR.read_bytes()}, "u/blind": {"m.gguf": model}})

    (seen, unseen), _ = elsewhere(environment(tmp_path, server.url), commands, [
        ("generate", "-m", name, "--backend", "reference", "--image", tmp_path / "red.png", "--image-tokens", "70", "-p", "x", "-n", "2",
         "--json") for name in ("hf:u/m:Q4_0", "hf:u/blind")])
    code, out, err = seen
    assert code == 0 and len(json.loads(out)["ids"]) == 2 and "mmproj-m-F16.gguf" in err, err
    code, out, err = unseen
    assert code == 1 and json.loads(out)["error"] == "hf:u/blind: no projector (mmproj) in the repository; there are m.gguf"


def test_the_hub_is_not_imported_unless_it_is_asked():
    code = "import refimpl, refimpl.cli, sys; print([m for m in sys.modules if m.startswith(('huggingface_hub', 'httpx', 'requests'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"
