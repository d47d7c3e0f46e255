"""Every sum of the audit, done again in another way."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest

from reports.documents.facts import documents
from reports.documents.formats import LAYOUTS, layout_of
from reports.documents.nanogpt_sizes import sizes
from reports.documents.printed import EXAMPLE, GPT2, PRINTED, symmetric
from reports.documents.sums import (
    ADDS_UP,
    CONTRADICTED,
    PARAMETERS,
    REMARK,
    bits_a_weight,
    bytes_of_codes,
    compression,
    exact,
    growth,
    quotient,
    range_of_codes,
)
from tests.reports.documents.audit_made import fact

BITS = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "q4_0": 4.5,
    "q4_1": 5.0,
    "q5_0": 5.5,
    "q5_1": 6.0,
    "q8_0": 8.5,
    "q2_k": 2.625,
    "q3_k": 3.4375,
    "q4_k": 4.5,
    "q5_k": 5.5,
    "q6_k": 6.5625,
}


def plain(**changes: object) -> dict[str, object]:
    return {"ours": None, "model": None, "protocol": None, **changes}


def test_bits_of_the_block_types() -> None:
    assert {name: layout.bits for name, layout in LAYOUTS.items()} == BITS
    assert 8 * LAYOUTS["q4_0"].bytes == 32 * 4 + 16 == 144
    assert layout_of("Q4_K_M") == (LAYOUTS["q4_k"], True)
    assert layout_of("Q8_0") == (LAYOUTS["q8_0"], False)
    assert layout_of("exl2") is None


def test_the_layouts_are_ggufs() -> None:
    gguf = pytest.importorskip("gguf")
    for name, layout in LAYOUTS.items():
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert (weights, size) == (layout.weights, layout.bytes), name


@pytest.mark.parametrize(
    ("name", "printed", "relation", "said"),
    [
        ("q4_0", 4.0, "=", CONTRADICTED),
        ("q4_0", 4.5, "=", ADDS_UP),
        ("q5_0", 5.0, "=", CONTRADICTED),
        ("q8_0", 8.0, "=", CONTRADICTED),
        ("q6_k", 6.0, "=", CONTRADICTED),
        ("q2_k", 2.5, "~", CONTRADICTED),
        ("q3_k_m", 3.3, "~", CONTRADICTED),
        ("q4_k_m", 4.8, "~", REMARK),
        ("q4_k_s", 4.5, "~", ADDS_UP),
        ("q6_k", 7.0, "=", CONTRADICTED),
        ("f16", 16.0, "=", ADDS_UP),
    ],
)
def test_bits_a_weight_against_print(name: str, printed: float, relation: str, said: str) -> None:
    quantity = f"{name} bits a weight"
    found = bits_a_weight(
        fact(**plain(quantity=quantity, value=printed, unit="bits", relation=relation))
    )
    assert found is not None
    assert found.verdict == said
    assert f"{BITS.get(name.removesuffix('_m').removesuffix('_s'), 0):g} bits a weight" in found.why


def test_parameters_are_those_the_configurations_state() -> None:
    folder = Path(__file__).parents[3] / "conf" / "model"
    for name, found in PARAMETERS.items():
        assert f"{found.exact:,} parameters" in (folder / f"{name}.yaml").read_text()


def size_of(model: str, method: str, value: float, unit: str = "GB") -> tuple[str, str]:
    made = fact(**plain(model=model, method=method, metric="size", value=value, unit=unit))
    found = bytes_of_codes(made)
    assert found is not None
    return found.verdict, found.why


def test_double_quantization_cannot_go_below_the_codes() -> None:
    said, why = size_of("llama-7b", "nf4 with double quantization", 2.8)
    assert said == CONTRADICTED
    assert "6,738,415,616 · 4 / 8 = 3.369 GB" in why
    assert 6_738_415_616 / 2 > 2.8 * 2**30
    assert size_of("llama-7b", "INT4", 3.5)[0] == ADDS_UP
    assert size_of("llama-7b", "INT3", 2.6)[0] == ADDS_UP
    assert size_of("llama-7b", "gptq 4 bits", 3.9)[0] == REMARK


def test_sizes_by_rounded_parameters_add_up_and_tell_the_exact_ones() -> None:
    for model, method, value, told in (
        ("llama-2-70b", "fp32", 280, "275.9 GB"),
        ("llama-2-70b", "fp16", 140, "138 GB"),
        ("llama-7b", "fp32", 28, "26.95 GB"),
        ("llama-7b", "fp16", 14, "13.48 GB"),
        ("llama-13b", "INT4", 6.5, "6.508 GB"),
        ("gpt2", "fp32", 500, "497.8 MB"),
    ):
        said, why = size_of(model, method, value, told.split()[1])
        assert said == ADDS_UP
        assert told in why
    assert size_of("mixtral-8x7b", "fp16", 90)[0] == REMARK
    assert "21.75 GiB" in size_of("mixtral-8x7b", "INT4", 22)[1]


def test_compression_is_a_quotient_of_widths() -> None:
    def said(bits: int, value: float, base: int) -> tuple[str, str] | None:
        entry = plain(method=f"INT{bits}", metric="compression", value=value)
        found = compression(fact(**entry, unit=f"ratio to FP{base}"))
        return None if found is None else (found.verdict, found.why)

    three = said(3, 5.3, 16)
    assert three is not None
    assert three[0] == ADDS_UP
    assert "16 / 3 = 5.33" in three[1]
    four = said(4, 4, 16)
    assert four is not None
    held = Fraction(16) / (4 + Fraction(16, 128))
    assert f"= {float(held):.2f}x" in four[1]
    assert said(4, 7, 32) is None


def test_ranges_of_codes() -> None:
    for bits in (2, 3, 4, 8):
        codes = [code - 2 ** (bits - 1) for code in range(2**bits)]
        entry = plain(method=f"INT{bits}", metric="range", value=codes[0], unit="code")
        right = range_of_codes(fact(**entry, to=codes[-1]))
        wrong = range_of_codes(fact(**entry, to=codes[-1] + 1))
        assert right is not None
        assert wrong is not None
        assert (right.verdict, wrong.verdict) == (ADDS_UP, CONTRADICTED)


def test_the_guides_example_is_done_again() -> None:
    scale, codes = symmetric(EXAMPLE)
    assert scale == 3.8 / 127
    assert codes == (-84, -33, 0, 40, 127)
    assert [round(code * 3.8 / 127, 2) for code in codes] == [-2.51, -0.99, 0, 1.2, 3.8]


def test_quantize_dynamic_leaves_gpt2s_embeddings() -> None:
    found = sizes(GPT2)
    # c_attn, c_proj, c_fc, c_proj of 12 blocks and the head in INT8; the rest in float32.
    matrices = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    rest = (50257 + 1024) * 768 + 12 * (2304 + 768 + 3072 + 768 + 4 * 768) + 2 * 768
    assert found.parameters == 124_439_808
    assert found.dynamic_bytes == matrices + 4 * rest
    assert round(found.dynamic_ratio, 2) == 1.77
    said = PRINTED["guide-3-ratio"](fact(value=3.93, unit="ratio to FP32"))
    assert said.verdict == CONTRADICTED
    assert "1.77x" in said.why


@pytest.mark.parametrize(
    ("over", "under", "printed"),
    [
        *((497.35, 126.54, 3.93), (45.23, 28.67, 1.58), (13.5, 7, 1.93), (13.5, 3.9, 3.46)),
        *((45, 28, 1.6), (62, 28, 2.2), (4.56, 3.12, 1.46)),
    ],
)
def test_printed_ratios_fit_their_two_figures(over: float, under: float, printed: float) -> None:
    said = quotient(over, under)(fact(value=printed, unit="ratio"))
    assert said.verdict == ADDS_UP
    assert quotient(over, under)(fact(value=printed + 0.2, unit="ratio")).verdict == CONTRADICTED


def test_increases_and_plain_sums() -> None:
    assert growth(5.72, 5.68)(fact(value=0.7, unit="%")).verdict == ADDS_UP
    assert growth(5.85, 5.68)(fact(value=3.0, unit="%")).verdict == ADDS_UP
    assert growth(5.85, 5.68)(fact(value=2.3, unit="%")).verdict == CONTRADICTED
    assert round(0.5 / 0.00784, 2) == 63.78
    assert exact(64 * 0.00784, "")(fact(value=0.50176, unit="weight")).verdict == ADDS_UP
    assert exact(math.log2(3), "")(fact(value=1.0, unit="bits")).verdict == CONTRADICTED


def test_every_printed_figure_that_is_checked_gets_a_verdict() -> None:
    found = {one.id: PRINTED[one.id](one) for one in documents().facts if one.id in PRINTED}
    assert set(found) == set(PRINTED)
    assert {said.verdict for said in found.values()} <= {ADDS_UP, CONTRADICTED, REMARK}
    assert all(said.why.endswith(".") for said in found.values())
    contradicted = {name for name, said in found.items() if said.verdict == CONTRADICTED}
    assert contradicted == {
        *("guide-3-quantized", "guide-3-ratio", "guide-4-bnb-fp32-one-gpu"),
        *("prune-quant-megabytes", "chapter-27.2.1-code-1", "chapter-27.3.3-128"),
        "intro-4-bitnet",
    }
