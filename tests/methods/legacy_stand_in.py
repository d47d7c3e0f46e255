"""Stands in for the interpreter of `make legacy-env`: does a job by rounding to nearest.

Writes what AutoGPTQ would: its names of files, the tied head a second time, float32 all over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BITS, GROUP = 4, 32


def words(codes: torch.Tensor) -> torch.Tensor:
    """Return int32 [rows / 8, columns] of codes [rows, columns], the first in the lowest bits."""
    eights = codes.long().reshape(-1, 8, codes.shape[1])
    shifts = 4 * torch.arange(8).reshape(1, 8, 1)
    return (eights << shifts).sum(1).to(torch.uint32).view(torch.int32)


def main() -> None:
    """Quantize what the job names."""
    script, job_file = Path(sys.argv[1]), Path(sys.argv[2])
    job = json.loads(job_file.read_text())
    inputs = load_file(job["inputs"])
    assert script.name == "quantize_gptq.py"
    assert script.is_file()
    assert inputs["tokens"].dtype == torch.int64
    assert inputs["logits"].dtype == torch.float32
    assert job["options"]["bits"] == BITS
    config = json.loads((Path(job["checkpoint"]) / "config.json").read_text())
    assert "rope_theta" in config
    assert "torch_dtype" in config
    out: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(Path(job["checkpoint"]) / "model.safetensors").items():
        if "layers" not in name or tensor.ndim < 2:
            out[name] = tensor.float()
            continue
        owner, weight = name.removesuffix(".weight"), tensor.float()
        groups = weight.reshape(weight.shape[0], -1, GROUP)
        scale = (groups.abs().amax(-1) / 7).half()
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
        out[f"{owner}.qweight"] = words(codes.flatten(1).T)
        # Zero points less 1, which the format wants.
        out[f"{owner}.qzeros"] = words(torch.full_like(scale, 7)).T.contiguous()
        out[f"{owner}.scales"] = scale.T.contiguous()
        out[f"{owner}.g_idx"] = (torch.arange(weight.shape[1]) // GROUP).int()
    out["lm_head.weight"] = out["model.embed_tokens.weight"].clone()
    output = Path(job["output"])
    output.mkdir()
    save_file(out, output / "gptq_model-4bit-32g.safetensors")
    stated = {"bits": BITS, "group_size": GROUP, "sym": True, "desc_act": False}
    config["quantization_config"] = {**stated, "quant_method": "gptq"}
    (output / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
