"""Results of `verify` as text."""


def as_text(result: dict[str, object]) -> str:
    """The result of `files.verify.verify`: a line for each check, or for each finding where one failed."""
    return "\n".join(f"{check['name']:<11} {check['state']:<9} {line}" for check in result["checks"]
                     for line in (check["findings"] if check["state"] == "FAILED" else [check["summary"]]))
