"""What no test owns."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

import pytest

from harness.device import VARIABLE


@pytest.fixture(autouse=True, scope="session")
def _own_devices() -> Iterator[None]:
    """Let the cells of these tests be alone on their devices: other tests run beside them."""
    with (
        tempfile.TemporaryDirectory(prefix="quantbench-locks-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(VARIABLE, folder)
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close what llama_cpp leaves open at its import, or the interpreter complains at its end."""
    utils = sys.modules.get("llama_cpp._utils")
    if utils is not None:
        utils.outnull_file.close()
        utils.errnull_file.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the file that takes longest first: begun last, it would leave the other worker idle."""
    items.sort(key=lambda item: item.path.name != "test_methods.py")
