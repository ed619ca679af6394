"""A comparison as SARIF 2.1.0 (OASIS Standard, 27 March 2020), which code hosts show: a result for each tensor that departs."""

import json
from urllib.parse import quote

import refimpl
from refimpl.lab.compare.judgement import DEPARTS, UNDECIDED, Comparison
from refimpl.lab.compare.reports.junit_xml import failure, kind, numbers
from refimpl.lab.compare.reports.likely import likely

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def as_sarif(result: Comparison) -> str:
    """The document. The first that departs is an error, those after it are notes: they may only have seen it."""
    results = []
    judged = [*result.stages, *result.judged]
    for j in (result.first, *(j for j in judged if j is not result.first)):
        if j is not None and j.verdict == DEPARTS:
            results.append(_result(result, kind(result, j), "error" if j is result.first else "note",
                                   f"{j.name} {failure(result, j)[0]}; {numbers(j)}", j.name))
    if result.verdict == UNDECIDED:
        results.append(_result(result, UNDECIDED, "warning", result.undecided, ""))
    kinds = list(dict.fromkeys(found["ruleId"] for found in results))
    rules = [{"id": word, "shortDescription": {"text": word.replace("-", " ")}} for word in kinds]
    driver = {"name": "refimpl compare", "semanticVersion": refimpl.__version__, "rules": rules}
    for found in results:
        found["ruleIndex"] = kinds.index(found["ruleId"])
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints",
           "properties": {"verdict": result.verdict, "trace": result.a, "likely": [name for name, _ in likely(result)]}}
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _result(result: Comparison, kind: str, level: str, text: str, name: str) -> dict[str, object]:
    """One result, in the file that was judged, under the name of its tensor."""
    where = {"physicalLocation": {"artifactLocation": {"uri": quote(result.b.replace("\\", "/"), errors="replace")}}}
    if name:
        where["logicalLocations"] = [{"fullyQualifiedName": name, "kind": "variable"}]
    return {"ruleId": kind.replace(" ", "-"), "level": level, "message": {"text": text}, "locations": [where]}
