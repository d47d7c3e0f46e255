"""Cache entries are verified, and rebuilt when they do not verify."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.cache import Cache


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    cache, built = Cache(tmp_path), []

    def build() -> dict[str, torch.Tensor]:
        built.append(1)
        return {"ids": torch.arange(10)}

    for _ in range(3):
        assert torch.equal(cache.get("tokens", ["a", 1], build)["ids"], torch.arange(10))
    assert len(built) == 1
    cache.get("tokens", ["a", 2], build)
    assert len(built) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    cache.write("tokens", "key", {"ids": torch.arange(100)})
    path = cache.path("tokens", "key")
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncate": content[:-7],
            "flip": content[:-1] + bytes([content[-1] ^ 1]),
            "empty": b"",
        }[damage]
    )
    assert cache.read("tokens", "key") is None
    rebuilt = cache.get("tokens", "key", lambda: {"ids": torch.arange(3)})
    assert torch.equal(rebuilt["ids"], torch.arange(3))
    assert cache.read("tokens", "key") is not None
