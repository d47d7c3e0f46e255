"""`make audit`: what bandit finds in the code, and what is known against the pinned libraries.

`--code` leaves the libraries out. Exit status 1: something was found. Where no vulnerability
service can be reached, one line says that the libraries were not looked up, and the code alone
counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODE = ("harness", "methods", "kernels", "reports", "hydra_plugins", "run.py")
LOOK_UP_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is found, a line each; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__)
    parser.add_argument("--code", action="store_true", help="bandit alone")
    options = parser.parse_args(arguments)
    audits = [audit_code] if options.code else [audit_code, audit_libraries]
    return max([audit() for audit in audits])


def audit_code() -> int:
    """Run bandit over the code, as `[tool.bandit]` of pyproject.toml says."""
    if importlib.util.find_spec("bandit") is None:
        print("bandit: not installed; install the extra `dev`")
        return 1
    configuration = ("-c", str(ROOT / "pyproject.toml"))
    answer = _answer("bandit", "-q", "-f", "json", *configuration, "-r", *CODE)
    found = answer["results"]
    for one in found:
        print(f"{one['filename']}:{one['line_number']}: {one['test_id']} {one['issue_text']}")
    for broken in answer["errors"]:
        print(f"{broken['filename']}: {broken['reason']}")
    lines = sum(part["loc"] for name, part in answer["metrics"].items() if name != "_totals")
    print(f"bandit: {len(found)} findings in {lines:,} lines of code")
    return 1 if found or answer["errors"] else 0


def audit_libraries() -> int:
    """Look up every pinned library with pip-audit."""
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit: skipped, it is not installed; install the extra `audit`")
        return 0
    # The pins are a whole resolution: nothing is installed or resolved for this.
    pinned = ("--requirement", str(ROOT / "constraints.txt"), "--disable-pip", "--no-deps")
    try:
        answer = _answer("pip_audit", *pinned, "--format", "json", "--progress-spinner", "off")
    except (ValueError, subprocess.TimeoutExpired) as error:
        print(f"pip-audit: skipped, no vulnerability service answers here ({_last_line(error)})")
        return 0
    return tell(answer["dependencies"])


def tell(libraries: Sequence[dict[str, Any]]) -> int:
    """Print what pip-audit says of each of `libraries`, in its own JSON; return the exit status."""
    known = [one for one in libraries if "skip_reason" not in one]
    unknown = [one["name"] for one in libraries if "skip_reason" in one]
    if not known:
        print(
            f"pip-audit: skipped, no vulnerability service answers here (none of "
            f"{len(unknown)} pinned libraries could be looked up)"
        )
        return 0
    for one in known:
        for hole in one["vulns"]:
            fixed = ", ".join(hole["fix_versions"]) or "no version yet"
            print(f"{one['name']} {one['version']}: {hole['id']}, fixed in {fixed}")
    bad = sum(bool(one["vulns"]) for one in known)
    print(f"pip-audit: {bad} of {len(known)} pinned libraries have known vulnerabilities")
    if unknown:
        print(f"pip-audit: not looked up, since the index does not know them: {', '.join(unknown)}")
    return 1 if bad else 0


def _answer(module: str, *arguments: str) -> Any:
    """Return what `python -m module` prints as JSON.

    Raises:
        ValueError: it printed something else; the error's text ends with its own last words.
        subprocess.TimeoutExpired: it took too long.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LOOK_UP_SECONDS,
        check=False,
    )
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise ValueError(done.stderr.strip() or f"exit status {done.returncode}") from error


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1][:200]


if __name__ == "__main__":
    sys.exit(main())
