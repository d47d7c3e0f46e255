"""Our package `kernels` is not taken for the hub's distribution of that name.

`transformers` asks whether a distribution `kernels` of certain versions is there, and then uses
whatever `import kernels` finds. That must not be ours, neither in a checkout nor installed.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import json, sys
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_kernels_available
import transformers.models.llama.modeling_llama
import kernels
print(json.dumps({
    "available": is_kernels_available(),
    "file": kernels.__file__,
    "submodules": sorted(n for n in sys.modules if n.startswith("kernels.")),
    "names": sorted(n for n in vars(kernels) if not n.startswith("__")),
}))
"""


def probe(folder: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_our_package_is_a_docstring_and_nothing_else() -> None:
    module = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert ast.get_docstring(module)
    assert len(module.body) == 1


def test_transformers_in_a_checkout_does_not_take_ours_for_the_hubs() -> None:
    found = probe(ROOT)
    assert Path(str(found["file"])) == ROOT / "kernels" / "__init__.py"
    assert found["available"] is False
    assert found["submodules"] == []
    assert found["names"] == []


def test_transformers_beside_an_install_does_not_take_ours_for_the_hubs(tmp_path: Path) -> None:
    # Building leaves metadata in the checkout, which is no install.
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    installed = list(metadata.distributions(name="quantbench", path=elsewhere))
    if not installed:
        pytest.skip("quantbench is not installed in this environment")
    version = installed[0].version
    assert version.startswith("0.1."), "transformers accepts `kernels` from 0.16 on"
    found = probe(tmp_path)
    assert found["available"] is False
    assert found["submodules"] == []
