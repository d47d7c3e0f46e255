"""The documents' nanoGPT figures against the arithmetic of the model they name."""

from __future__ import annotations

import pytest

from reports.documents.nanogpt_sizes import MIB, SHAKESPEARE_CHAR, Shape, sizes

ORIGINAL_MIB, QUANTIZED_MIB = 39.47, 11.23
"""What the documents print, in units of 2 ** 20 bytes as their script computes."""


def test_the_character_model_has_10_7_million_parameters_and_41_mebibytes() -> None:
    found = sizes(SHAKESPEARE_CHAR)
    assert found.parameters == 10_745_088
    assert found.linear == 10_616_832
    assert found.float32_bytes / MIB == pytest.approx(40.99, abs=0.01)
    assert found.checkpoint_bytes / MIB == pytest.approx(122.97, abs=0.01)


def test_the_documents_sizes_are_not_those_of_the_files_they_compare() -> None:
    found = sizes(SHAKESPEARE_CHAR)
    assert found.dynamic_bytes / MIB == pytest.approx(10.64, abs=0.01)
    assert found.dynamic_ratio == pytest.approx(3.85, abs=0.01)
    assert found.checkpoint_ratio == pytest.approx(11.56, abs=0.01)
    # What the documents print as the original is less than the weights alone.
    assert found.float32_bytes / MIB > ORIGINAL_MIB
    assert found.checkpoint_bytes / MIB > 3 * ORIGINAL_MIB
    # The quantized file has room for what a zip archive adds around the tensors.
    assert 1 < QUANTIZED_MIB * MIB / found.dynamic_bytes < 1.06


def test_a_head_that_stays_tied_is_not_stored_twice() -> None:
    found = sizes(SHAKESPEARE_CHAR)
    assert found.dynamic_bytes - found.tied_dynamic_bytes == found.head == 65 * 384


def test_gpt2_with_biases_has_the_parameters_it_is_known_for() -> None:
    gpt2 = Shape(layers=12, width=768, context=1024, vocabulary=50257, bias=True)
    assert sizes(gpt2).parameters == 124_439_808
