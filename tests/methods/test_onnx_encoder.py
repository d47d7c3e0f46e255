from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.hardware import Hardware
from methods.base import Calibration
from methods.encoder_engine import EncoderEngine
from methods.engine import relative_difference
from methods.onnx_encoder import OnnxEncoder
from methods.onnx_int8 import OnnxInt8Dynamic
from methods.onnx_int8_static import OnnxInt8Static
from tests.encoders import batch, encoder_tokenizer, tiny_encoder

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

CPU = Hardware("cpu", "cpu", threads=1, allow_fallback=True)


@pytest.mark.parametrize(
    ("method", "kind", "worst"),
    [
        (OnnxInt8Dynamic("onnx_int8_dynamic"), "roberta", 0.1),
        (OnnxInt8Static("onnx_int8_static", Calibration(4, 24, 0)), "bert", 0.1),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else None,
)
def test_an_encoder_goes_through_onnx(
    method: OnnxInt8Dynamic | OnnxInt8Static,
    kind: str,
    worst: float,
    tmp_path: Path,
) -> None:
    model = tiny_encoder(kind)
    ids, mask = batch()
    kept = mask.bool()
    reference = EncoderEngine(model, "cpu", [])
    hidden = reference.encode(ids, mask)
    filled = reference.fill(ids, mask) if kind != "bert" else None
    vectors = reference.embed(ids, mask)
    calibration = torch.randint(5, 96, (4, 24), generator=torch.Generator().manual_seed(1))
    method.quantize(
        model, encoder_tokenizer(), calibration if method.needs_calibration else None, tmp_path
    )
    engine = method.load(tmp_path, CPU)
    assert isinstance(engine, OnnxEncoder)
    assert len(engine.kernels()) == 12
    assert all("onnxruntime" in use.kernel for use in engine.kernels())
    assert relative_difference(engine.encode(ids, mask)[kept], hidden[kept]) <= worst
    assert relative_difference(engine.embed(ids, mask), vectors) <= worst
    if filled is not None:
        assert "fill" in engine.capabilities
        assert relative_difference(engine.fill(ids, mask)[kept], filled[kept]) <= 2 * worst
    plain = method.load_dequantized(tmp_path, CPU)
    assert isinstance(plain, EncoderEngine)
    found = plain.encode(ids, mask)[kept]
    assert relative_difference(engine.encode(ids, mask)[kept], found) <= method.path_tolerance
    assert engine.context_length == plain.context_length
    if not engine.couples_rows:
        alone = torch.cat(
            [
                engine.embed(ids[row : row + 1, :length], mask[row : row + 1, :length])
                for row, length in enumerate(mask.sum(1).tolist())
            ]
        )
        torch.testing.assert_close(alone, engine.embed(ids, mask), rtol=1e-3, atol=1e-4)
