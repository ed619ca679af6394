"""What a comparison says around its tensors: file, text, ids and sampling, coverage and arithmetic; and its reports, valid and escaped."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from cli import assert_one_line, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shapes import prompt, random_model, reference, write_model

from refimpl.cli.show.compare import as_text, ranges
from refimpl.lab.compare.compare import compare
from refimpl.lab.compare.known_bugs import BUGS, inject
from refimpl.lab.compare.names import graph_order
from refimpl.lab.compare.record import trace, write_trace
from refimpl.lab.compare.reports.junit_xml import as_junit
from refimpl.lab.compare.reports.likely import code_of, likely
from refimpl.lab.compare.reports.page import as_html
from refimpl.lab.compare.reports.sarif import as_sarif
from refimpl.lab.compare.trace import Trace

IDS = prompt(10)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reference(write_model(tmp_path_factory.mktemp("m") / "m.gguf", random_model("26B-A4B", seed=3)))


@pytest.fixture(scope="module")
def ours(model):
    return trace(model, IDS)


def changed(ours: Trace, facts=None, **arrays) -> Trace:
    """The trace as of another engine in float32."""
    arrays = {name.replace("__", "-"): x for name, x in arrays.items()}
    return dataclasses.replace(ours, where="theirs.npz", arithmetic="float32", facts=facts or {}, arrays=dict(ours.arrays) | arrays)


# ---- before and after the tensors

STAGES = {"model_sha256": ("file", "a" * 64, "b" * 64), "prompt": ("prompt", "one two three", "one two 3"),
          "template": ("template", "<|turn>one", "<|turn>two")}


def test_the_first_stage_that_differs_is_the_answer(ours):
    """File, then text, then template, then ids; what is behind it, even a wrong tensor, is not compared."""
    right = {fact: first for fact, (_, first, _) in STAGES.items()}
    a = dataclasses.replace(ours, facts=right)
    for i, (stage, _, _) in enumerate(STAGES.values()):
        facts = {fact: first if k < i else second for k, (fact, (_, first, second)) in enumerate(STAGES.items())}
        found = compare(a, changed(ours, facts, l_out__0=ours.arrays["l_out-0"] * 2))
        assert found.first.name == stage and found.judged == [] and [j.verdict for j in found.stages] == ["same"] * i + ["departs"]
        said = as_text(found)
        assert f"departs: {stage}: " in said and "tensors were not compared" in said and "0 of 10 positions" in said
    assert "character 8 (of 13 and 9): 'one two three' and 'one two 3'" in compare(
        dataclasses.replace(ours, facts={"prompt": "one two three"}), changed(ours, {"prompt": "one two 3"})).diagnosis.text
    other = dataclasses.replace(changed(ours, right), ids=(*IDS[:7], 9, *IDS[8:]))
    found = compare(a, other)
    assert found.first.name == "ids" and found.first.position == 7 and "differ at token 7" in found.diagnosis.text
    assert "the template is the same, so the tokenizers differ" in found.diagnosis.text
    found = compare(a, changed(ours, right))
    assert found.verdict == "same" and [j.name for j in found.stages] == ["file", "prompt", "template", "ids"]


def test_sampling_is_judged_after_all_tensors(ours):
    best = int(ours.arrays["result_output"][-1].argmax())

    def sampled(id_, temperature=0.0, **arrays):
        return compare(ours, changed(ours, {"sampled": id_, "temperature": temperature}, **arrays))
    assert sampled(best).verdict == "same" and sampled(best).stages[-1].name == "sampled"
    found = sampled(best + 1)
    assert found.first.name == "sampled" and f"by its own logits {best} is the likeliest" in found.diagnosis.text
    assert f"departs: sampled: id {best + 1} was taken" in as_text(found)
    assert sampled(10**6).first.name == "sampled" and sampled(best + 1, l_out__0=-ours.arrays["l_out-0"]).first.name == "l_out-0"
    found = sampled(best + 1, 0.8)
    assert found.verdict == "same" and "random numbers" in found.missing[-1]
    lacking = changed(ours, {"sampled": best + 1, "temperature": 0.0})
    lacking = dataclasses.replace(lacking, arrays={"l_out-0": ours.arrays["l_out-0"]})
    assert compare(ours, lacking).verdict == "same", "no logits of its own, and ours have no tolerance here: not judged"


def test_a_text_and_a_chat_template_are_in_the_trace(tmp_path):
    call = ("trace", "-p", "Hello", "--backend", "reference", "--tensors", "inp_scaled")
    assert run(*call, "-o", tmp_path / "a.safetensors", "--npz", tmp_path / "a.npz", "--chat")[0] == 0
    with np.load(tmp_path / "a.npz") as file:
        assert str(file["prompt"]) == "Hello" and "Hello" in str(file["template"]) and len(str(file["template"])) > len("Hello")
        arrays = dict(file)
    np.savez(tmp_path / "b.npz", **arrays | {"template": np.str_(str(arrays["template"]).replace("Hello", " Hello"))})
    status, out, _ = run("compare", tmp_path / "a.safetensors", tmp_path / "b.npz")
    assert status == 1 and "departs: template: the outputs of the chat template differ at character" in out
    assert "the same: file, prompt" in out


# ---- what was judged

def test_the_first_line_says_what_it_was_judged_at_and_coverage_follows(ours):
    rows = {name: x[4:5] for name, x in ours.arrays.items() if name in ("l_out-0", "l_out-1")}
    found = compare(ours, dataclasses.replace(changed(ours), arrays=rows, positions=(4,)))
    first, _, third, *rest = as_text(found).splitlines()
    assert first.startswith("judged: float32 against exact; tolerances are 5 times the rounding errors of both, guessed")
    assert third == f"compared: 2 of {len(ours.names())} tensors, 1 of 10 positions (4)"
    assert rest[-1].startswith("the same within rounding, where it was compared: 2 tensors")
    whole = compare(ours, changed(ours))
    assert f"compared: {len(ours.names())} of {len(ours.names())} tensors, 10 of 10 positions\n" in as_text(whole)
    assert "the same within rounding: " in as_text(whole)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 30), max_size=12))
def test_ranges_hold_all_numbers(numbers):
    words = [list(map(int, word.split("-"))) for word in ranges(sorted(numbers)).split(", ") if word and " and " not in word]
    assert [n for word in words for n in range(word[0], word[-1] + 1)] == sorted(numbers)[:sum(w[-1] - w[0] + 1 for w in words)]


def test_a_float_engine_is_not_called_the_same_by_a_trace_in_8_bits(ours, model, tmp_path):
    q8 = dataclasses.replace(ours, where="right.safetensors", arithmetic="q8")
    found = compare(q8, changed(ours))
    assert found.first is None and found.verdict == "undecided" and "trace again with --arithmetic exact" in found.undecided
    assert "not make it the same" in as_text(found) and "the same within rounding" not in as_text(found)
    assert compare(q8, dataclasses.replace(changed(ours), arithmetic="q8")).verdict == "same"
    assert compare(ours, dataclasses.replace(changed(ours), arithmetic="q8")).verdict == "same"
    assert compare(q8, changed(ours, l_out__0=-ours.arrays["l_out-0"])).verdict == "departs"
    write_trace(tmp_path / "q8.safetensors", reference(model.file.path, arithmetic="q8"), IDS)
    np.savez(tmp_path / "x.npz", ids=np.array(IDS), arithmetic="float32", **{"l_out-0": ours.arrays["l_out-0"]})
    status, out, _ = run("compare", tmp_path / "q8.safetensors", tmp_path / "x.npz", "--guess", "--json")
    assert status == 3 and json.loads(out)["verdict"] == "undecided" and not json.loads(out)["same"]


def test_one_place_is_named_by_the_command_line(ours):
    one = ours.arrays["Qcur-1"].copy()
    one[3, 1, 5] += 0.5
    said = as_text(compare(ours, changed(ours, Qcur__1=one)))
    assert f"looks like:    one element of {one.size:,}: position 3, channel 5 of head 1: " in said and said.count("one element") == 1


# ---- reports

NASTY = """</title><script>alert(1)</script>]]>"'&amp;\x01\ud800{{ 7*7 }}"""


def results(ours):
    """Comparisons of every verdict: stages and tensors that depart, ties, undecided."""
    same, chosen = compare(ours, changed(ours)), ours.arrays["ffn_moe_topk-0"]
    tied = dataclasses.replace(same, judged=[dataclasses.replace(same.judged[0], verdict="tie"), *same.judged[1:]], tie="a tie")
    return {"same": same, "tie": tied, "departs": compare(ours, changed(ours, l_out__2=ours.arrays["l_out-2"] * 2)),
            "not finite": compare(ours, changed(ours, l_out__2=ours.arrays["l_out-2"] * np.nan)),
            "shape": compare(ours, changed(ours, l_out__2=ours.arrays["l_out-2"][:, :5])),
            "choice": compare(ours, changed(ours, ffn_moe_topk__0=(chosen + 1) % 8)),
            "ids": compare(ours, dataclasses.replace(changed(ours), ids=(*IDS[:4], 9, *IDS[5:]))),
            "undecided": compare(dataclasses.replace(ours, arithmetic="q8"), changed(ours))}


def nasty(result):
    """With hostile names in all places that come from a dump."""
    diagnosis = result.diagnosis and dataclasses.replace(result.diagnosis, text=NASTY)
    return dataclasses.replace(result, a=NASTY, b=NASTY, missing=[NASTY], unknown=[NASTY], tie=NASTY, diagnosis=diagnosis,
                               undecided=NASTY if result.undecided else "")


@pytest.fixture(scope="module")
def compared(ours):
    return {key: f(result) for key, result in results(ours).items() for key, f in ((key, lambda x: x), (key + ", nasty", nasty))}


def test_junit_is_what_ci_reads(compared):
    for key, result in compared.items():
        text = as_junit(result)
        root = ElementTree.fromstring(text.encode("utf-8"))
        (suite,) = root
        assert (root.tag, suite.tag) == ("testsuites", "testsuite")
        assert {"name", "tests", "failures", "errors", "skipped", "time"} <= {*suite.attrib}
        cases = list(suite)
        assert int(suite.get("tests")) == int(root.get("tests")) == len(cases)
        assert all({"name", "classname", "time"} <= {*case.attrib} for case in cases)
        kinds = [child.tag for case in cases for child in case]
        for tag, counted in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert kinds.count(tag) == int(suite.get(counted)), key
        assert ("skipped" in kinds) == key.startswith("tie")
        assert ("failure" in kinds, "error" in kinds) == (result.verdict == "departs", result.verdict == "undecided"), key
        assert all(child.get("message") for case in cases for child in case)
        assert {j.name for j in (*result.judged, *result.stages)} <= {case.get("name") for case in cases}


def test_sarif_has_what_2_1_0_requires(compared):
    for result in compared.values():
        found = json.loads(as_sarif(result).encode("utf-8", "surrogatepass"))
        assert found["version"] == "2.1.0" and "sarif-schema-2.1.0.json" in found["$schema"]
        (only,) = found["runs"]
        driver = only["tool"]["driver"]
        assert driver["name"] and all(rule["id"] for rule in driver["rules"])
        n_departing = sum(j.verdict == "departs" for j in (*result.judged, *result.stages))
        assert len(only["results"]) == n_departing + (result.verdict == "undecided")
        for i, one in enumerate(only["results"]):
            assert one["message"]["text"] and driver["rules"][one["ruleIndex"]]["id"] == one["ruleId"] and " " not in one["ruleId"]
            assert one["level"] == ("warning" if result.verdict == "undecided" else "note" if i else "error")
            uri = one["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
            assert re.fullmatch(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-F]{2})+", uri), uri


class Page(HTMLParser):
    """What is on a page: tags, attributes, text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_escapes_all(compared):
    for key, result in compared.items():
        page = Page(as_html(result))
        assert "script" not in page.tags
        assert not [value for name, value in page.attributes if name in ("src", "href") and not value.startswith("data:image/png;base64,")]
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        if "nasty" in key:
            assert NASTY.partition("\x01")[0] in page.text and "{{ 7*7 }}" in page.text, key
        assert page.tags.count("td") >= len([j for j in result.judged if j.tolerance])
        assert page.tags.count("img") == (key.startswith("departs") or key.startswith("not finite")), key


def test_the_picture_is_red_where_it_departs(ours):
    bad = ours.arrays["l_out-2"].copy()
    bad[3, 10:14] *= 2
    page = as_html(compare(ours, changed(ours, l_out__2=bad)))
    png = base64.b64decode(re.search(r"data:image/png;base64,([\w+/=]+)", page)[1])
    rgb = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    assert rgb.shape == (10, 64, 3)
    red = rgb[..., 0] > rgb[..., 2] + 40
    assert red[3, 10:14].all() and red.sum() == 4
    assert len(re.findall(r'class="first"', page)) == 1 and 'title="l_out-2: departs' in page


@pytest.mark.parametrize("name", ["values not normalised", "no norm after attention", "layer scalar left out"])
def test_the_mistake_that_was_made_is_among_the_likely(name, model, ours):
    bug = BUGS[name]
    with inject(bug):
        found = compare(ours, changed(ours, **{n.replace("-", "__"): x for n, x in trace(model, IDS).arrays.items()}))
    names = [other for other, _ in likely(found)]
    assert name in names and found.diagnosis.kind == bug.kind
    where, diff = code_of(bug)
    assert where.startswith("refimpl/") and where.endswith(bug.function.__qualname__)
    assert {line[0] for line in diff.splitlines()} == {"+", "-", " "} and name in Page(as_html(found)).text


@pytest.mark.parametrize("name", BUGS)
def test_every_known_mistake_has_its_code(name):
    assert re.search(r"^\+", code_of(BUGS[name])[1], re.M) and graph_order([BUGS[name].first.format(full=0, shared=0)])


def test_reports_are_written_whole_or_not_at_all(model, ours, tmp_path):
    write_trace(tmp_path / "right.safetensors", model, IDS)
    np.savez(tmp_path / "x.npz", ids=np.array(IDS), arithmetic="float32", **{"l_out-0": ours.arrays["l_out-0"] * 2})
    call = ("compare", tmp_path / "right.safetensors", tmp_path / "x.npz", "--guess")
    names = {"--html": "r.html", "--junit": "r.xml", "--sarif": "r.sarif"}
    paths = [word for option, name in names.items() for word in (option, tmp_path / name)]
    assert run(*call, *paths)[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.sarif", "r.xml", "right.safetensors", "x.npz"]
    assert ElementTree.parse(tmp_path / "r.xml").getroot().get("failures") == "1"
    assert json.loads((tmp_path / "r.sarif").read_text())["runs"][0]["results"][0]["locations"][0]["logicalLocations"][0][
        "fullyQualifiedName"] == "l_out-0"
    assert_one_line(run(*call, *paths), 3, "exists; --force overwrites it")
    assert_one_line(run(*call, "--html", tmp_path / "no" / "r.html"), 3, "No such file or directory")
    assert_one_line(run(*call, "--html", tmp_path / "n", "--junit", tmp_path / "n"), 3, "same name")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert_one_line(run("compare", tmp_path / "right.safetensors", tmp_path / "gone.npz", *paths, "--force"), 3, "gone.npz")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
