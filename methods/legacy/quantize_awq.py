"""Quantize a float checkpoint with AutoAWQ 0.2.9 (GEMM format); the job: see `exchange.py`."""

from __future__ import annotations

from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from exchange import check_same_model, read_job


class Quantizer(AwqQuantizer):  # type: ignore[misc]  # the library has no types
    """AutoAWQ's own, with a search that puts the weights back after each trial on a CPU, too.

    It keeps them as `{name: tensor.cpu()}`, which on a CPU copies nothing: the scales of the first
    trial stayed in the weights, and the model's KL divergence was twelve times RTN's.
    """

    def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, part: Any, *rest: Any) -> Any:
        kept = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        part.state_dict = lambda: kept
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, part, *rest)
        finally:
            del part.state_dict


def main() -> None:
    """Do the job named on the command line."""
    job, tokens, logits = read_job()
    options = job["options"]
    # AutoAWQ works in float16; a CPU only emulates that, so there it searches in float32.
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    model = AutoAWQForCausalLM.from_pretrained(
        job["checkpoint"], torch_dtype=dtype, safetensors=True, device_map="cpu"
    )
    check_same_model(model.model.float(), tokens, logits)
    model.model.to(dtype)
    model.quantize(
        quant_config={
            "zero_point": True,
            "q_group_size": options["group_size"],
            "w_bit": 4,
            "version": "GEMM",
        },
        calib_data=tokens.tolist(),
        max_calib_samples=tokens.shape[0],
        max_calib_seq_len=tokens.shape[1],
        duo_scaling=options["duo_scaling"],
        apply_clip=options["clip"],
        quantizer_cls=Quantizer,
    )
    model.save_quantized(job["output"])


if __name__ == "__main__":
    main()
