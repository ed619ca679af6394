"""The documents say what is true: links lead somewhere, commands and options exist, examples run, the README fits on its pages."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from refimpl.files.synth import SHAPES
from refimpl.lab.compare.known_bugs import BUGS
from refimpl.lab.compare.towers.known_bugs import TOWER_BUGS
from refimpl.model import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CHANGELOG.md", "NOTICE.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md", "tests/README.md",
             "refimpl/tiny/README.md", "refimpl/kernels/README.md", "refimpl/lab/bench/README.md", "refimpl/lab/compare/README.md",
             "refimpl/lab/evaluate/README.md", "refimpl/lab/judge/README.md", "refimpl/serve/README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks in a language."""
    return [body for name, body in FENCE.findall(text) if name == language]


def commands(text: str) -> list[list[str]]:
    """Calls of the command line, in shell blocks, in console blocks after a `$` and in `code`, as words after `refimpl`."""
    prose = FENCE.sub("", text)
    lines = [line for body in blocks(text, "sh") for line in body.splitlines()]
    lines += [line[2:] for body in blocks(text, "console") for line in body.splitlines() if line.startswith("$ ")]
    lines += [" ".join(code.split()) for code in re.findall(r"`(refimpl [^`]+)`", prose)]
    found = [re.search(r"(?:^|/)refimpl (.+)", line) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def test_the_readme_has_at_most_150_lines_of_100_columns():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_prose_has_at_most_100_columns(name):
    prose = FENCE.sub("", (ROOT / name).read_text())
    assert [line for line in prose.splitlines() if len(line) > 100 and not line.startswith("|")] == []


def anchor(heading: str) -> str:
    """How GitHub names a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    document = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text())):
        if target.startswith("https://"):
            continue
        path, _, section = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), f"{name} links to {target}"
        if section:
            assert section in map(anchor, re.findall("^#+ (.+)$", linked.read_text(), re.MULTILINE)), f"{name} links to {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    """`room/file.py`, `file.py` and `python -m module` in code font."""
    text = (ROOT / name).read_text()
    known = {path.relative_to(ROOT).as_posix() for folder in ("refimpl", "tests", "notebooks") for path in (ROOT / folder).rglob("*")}
    for named in re.findall(r"`([\w/]+\.py|[\w/]+/\w+\.(?:gguf|ipynb))`", text):
        assert any(path == named or path.endswith("/" + named) for path in known), f"{name} names {named}"
    for module in re.findall(r"python -m (refimpl[\w.]*)", text):
        path = module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__main__.py"} & known, f"{name} runs {module}"


def test_the_readme_links_every_notebook():
    assert [path.name for path in ROOT.glob("notebooks/*.ipynb") if f"(notebooks/{path.name})" not in README] == []


@pytest.mark.parametrize("marker", ["run", "tests"])
def test_the_two_commands_are_one_line_each(marker):
    """.ci/run cuts them out like this."""
    match = re.search(rf"^<!-- {marker} -->\n```sh\n(.+)\n```$", README, re.MULTILINE)
    assert match and re.match(r"python3 -m venv (--upgrade-deps )?\.venv && \.venv/bin/pip install ", match[1])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_their_options_exist(name):
    from typer.main import get_command

    import refimpl.cli

    app = get_command(refimpl.cli.app)
    for first, *words in commands((ROOT / name).read_text()):
        if first.startswith("-"):
            known = [option for parameter in app.params for option in parameter.opts] + ["--help"]
            assert first in known, f"{name}: refimpl {first}"
            continue
        assert first in app.commands, f"{name}: refimpl {first}"
        command = app.commands[first]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        for word in words:
            if re.fullmatch(r"--?[a-zA-Z][\w-]*", word):
                assert word in known, f"{name}: refimpl {first} {word}"


def test_the_table_of_models_is_complete():
    names = re.findall(r"`hf:google/gemma-4-([\w-]+?)-it-([\w-]+)`", README)
    assert [model for model, kind in names if kind.endswith("gguf")] == list(SHAPES)
    assert [model for model, kind in names if kind.endswith("assistant")] == list(SHAPES)


def test_the_python_example_runs_in_twelve_lines(capsys):
    (example,) = blocks(README, "python")
    assert len(example.splitlines()) <= 12
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert shown.startswith(names["out"].text) and "l_out-5" in shown
    assert names["logits"].shape == (len(names["ids"]), names["model"].config.n_vocab)


def test_the_sample_of_compare_is_of_a_known_bug():
    (sample,) = blocks(README, "console")
    first = re.search(r"departs first: (\S+), position", sample)[1]
    assert first == BUGS["window one too long"].first and "a window of another length" in sample


def test_the_letters_of_shapes_are_those_of_config():
    text = (ROOT / ".github/CONTRIBUTING.md").read_text()
    ours = set(re.findall(r"\*\*([A-Z])\*\*", text))
    key = config.__doc__.partition("letters:")[2]
    assert ours == set(re.findall(r"\s([A-Z]) [a-z]", key))


def test_numbers_of_known_bugs():
    for bugs in (BUGS, TOWER_BUGS):
        n_named = sum(bool(bug.kind) for bug in bugs.values())
        assert f"right in {len(bugs)} of {len(bugs)}, the kind of mistake in {n_named} |" in (ROOT / "tests/README.md").read_text()


def test_speeds_in_the_readme_are_those_of_the_measurements():
    def numbers(line):
        return re.findall(r"\d+\.\d+", line)
    measured = (ROOT / "refimpl/lab/bench/README.md").read_text().splitlines()
    rows = [line for line in README.splitlines() if line.startswith("|") and " layers" in line]
    assert len(rows) == 3
    for row in rows:
        assert any(set(numbers(row)) <= set(numbers(line)) for line in measured), row
    for model, speeds in re.findall(r"^\| ([\w-]+) \| `hf:[^|]+\|[^|]+\|[^|]+\| ([\d., ]+) \|$", README, re.MULTILINE):
        prompt, new = speeds.split(", ")
        assert any(re.match(rf"\| {re.escape(model)} \| {prompt} \(.+\| {new} \(", line) for line in measured), model
    assert len(re.findall(r"^\| [\w-]+ \| `hf:[^|]+gguf`.+ \d+\.\d, \d+\.\d \|$", README, re.MULTILINE)) == len(SHAPES)


def test_licences_and_types_go_along_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [pattern for pattern in project["license-files"] if not list(ROOT.glob(pattern))] == []
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (ROOT / "LICENSES/PSF-2.0.txt").read_text()
    assert (ROOT / "refimpl/py.typed").exists()


def test_types_in_the_measurements_are_those_of_the_notebook():
    measured = json.loads((ROOT / "refimpl/lab/explain/measured_types.json").read_text())
    text = (ROOT / "refimpl/lab/bench/README.md").read_text().partition("## Types")[2].partition("## Drafting")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 11
    for name, _, _, error, decoding, prompt in rows:
        assert abs(float(error.removesuffix(" %")) - 100 * measured["ggml"]["types"][name][0]) < 0.051, name       # one decimal
        assert [float(decoding), float(prompt)] == measured["kernels"]["types"][name], name


def test_the_house_has_every_room():
    """But for tiny, which makes the built-in model and is not needed to run one."""
    rooms = {path.parent.name for path in (ROOT / "refimpl").glob("*/__init__.py")} - {"tiny"}
    assert set(re.findall(r">(\w+)/</text>", (ROOT / ".github/house.svg").read_text())) == rooms
