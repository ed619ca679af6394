"""A comparison as JUnit's XML, which CI systems show: a test case for each stage and tensor, a failure for each that departs."""

import re
from xml.etree import ElementTree

from refimpl.lab.compare.judgement import DEPARTS, UNDECIDED, Comparison, Judgement
from refimpl.lab.compare.names import place_of

FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")        # characters that XML 1.0 has no place for


def as_junit(result: Comparison) -> str:
    """The document. A tie is skipped; what cannot be decided is an error."""
    judged = [*(j for j in result.stages if j.name != "sampled"), *result.judged, *(j for j in result.stages if j.name == "sampled")]
    n_departing, n_ties = (sum(j.verdict == verdict for j in judged) for verdict in (DEPARTS, "tie"))
    undecided = result.verdict == UNDECIDED
    counts = {"tests": len(judged) + undecided, "failures": n_departing, "errors": int(undecided), "skipped": n_ties, "time": 0}
    counts = {key: str(value) for key, value in counts.items()}
    root = ElementTree.Element("testsuites", {"name": "refimpl compare"} | {key: counts[key] for key in counts if key != "skipped"})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(f"{result.b} by {result.a}")} | counts)
    for j in judged:
        case = ElementTree.SubElement(suite, "testcase", {"name": _clean(j.name), "classname": group(j), "time": "0"})
        if j.verdict == DEPARTS:
            message, text = failure(result, j)
            ElementTree.SubElement(case, "failure", {"message": _clean(message), "type": _clean(kind(result, j))}).text = _clean(text)
        elif j.verdict == "tie":
            ElementTree.SubElement(case, "skipped", {"message": _clean(result.tie or "a tie")})
    if undecided:
        case = ElementTree.SubElement(suite, "testcase", {"name": "arithmetic", "classname": "compare", "time": "0"})
        ElementTree.SubElement(case, "error", {"message": _clean(result.undecided), "type": "undecided"})
    ElementTree.indent(root)
    return ElementTree.tostring(root, "unicode", xml_declaration=False).join(('<?xml version="1.0" encoding="UTF-8"?>\n', "\n"))


def group(j: Judgement) -> str:
    """The class of a test case: the layer, as "layer.3" or "image0.layer.3"."""
    place = place_of(j.name)
    if place is None:
        return "before tensors" if j.name != "sampled" else "after tensors"
    return place.prefix + ("around" if place.layer is None else f"layer.{place.layer}")


def failure(result: Comparison, j: Judgement) -> tuple[str, str]:
    """(one line, all that is known) of one that departs."""
    if j is result.first and result.diagnosis is not None:
        return f"departs first: {result.diagnosis.text}", numbers(j)
    return f"departs, after {result.first.name}", numbers(j)


def kind(result: Comparison, j: Judgement) -> str:
    """The kind of difference, which is known of the first."""
    return result.diagnosis.kind if j is result.first and result.diagnosis is not None else DEPARTS


def numbers(j: Judgement) -> str:
    """Where the largest difference is."""
    element = f", element {', '.join(map(str, j.index))}: {j.ours:.7g} and {j.theirs:.7g}" if j.index else ""
    return f"position {j.position}{element}; deviation {j.error:.3g}, tolerance {j.tolerance:.3g}"


def _clean(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
