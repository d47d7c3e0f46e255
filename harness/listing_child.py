"""What runs one listing of the documents: a script for `harness.listings`, standard library only.

Any interpreter can run it, so that the archived libraries of an older environment answer too. The
job is a file of JSON that names the listing, the file of a probe (or none), the packages whose
versions are asked for, and where the outcome goes. The listing runs as a program of its own would;
then the probe's `probe(names)` is given what the listing defined and returns facts.

The driver sets limits of time and takes the network away; this script limits the memory.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

MESSAGE_CHARACTERS = 2000


def main(path: str) -> None:
    """Do the job at `path`; its outcome is written unless something ends the process."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    resource.setrlimit(resource.RLIMIT_DATA, (job["memory_bytes"], job["memory_bytes"]))
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = [job["listing"]]
    outcome: dict[str, Any] = {"exit": 0}
    names: dict[str, Any] = {}
    try:
        if job["listing"]:
            names = runpy.run_path(job["listing"], run_name="__main__")
        if job["probe"]:
            outcome["found"] = runpy.run_path(job["probe"])["probe"](names)
    except SystemExit as end:
        outcome["exit"] = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001  # whatever a listing raises is what is asked for
        outcome |= _told(error, job["listing"])
    outcome["versions"] = {name: found for name in job["packages"] if (found := _version(name))}
    Path(job["outcome"]).write_text(json.dumps(outcome), encoding="utf-8")


def _told(error: BaseException, listing: str) -> dict[str, Any]:
    """Return what an uncaught exception says and the last line of the listing it went through."""
    kind = type(error)
    line = offset = None
    if isinstance(error, SyntaxError) and Path(error.filename or "").name == listing:
        line, offset, message = error.lineno, error.offset, error.msg
    else:
        message = str(error)
        for frame in traceback.extract_tb(error.__traceback__):
            if listing and Path(frame.filename).name == listing:
                line = frame.lineno
    return {
        "exit": 1,
        "exception": kind.__name__,
        "message": message[:MESSAGE_CHARACTERS],
        "line": line,
        "offset": offset,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(sys.argv[1])
