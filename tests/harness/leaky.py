"""A method whose library quotes the user's key when it fails (tests/harness/test_redact.py)."""

from __future__ import annotations

import os
from pathlib import Path

from methods.base import Engine, Hardware
from methods.unquantized import Unquantized


class Leaky(Unquantized):
    """As `Unquantized`, and loading fails."""

    def load(self, artefact: Path, hardware: Hardware) -> Engine:
        key = os.environ["HF_TOKEN"]
        print(f"GET https://me:{os.environ['PGPASSWORD']}@hub.example with {key}")
        raise RuntimeError(f"401 for Bearer {key} at {os.environ['HTTPS_PROXY']}")
