"""Quantize a float checkpoint with AutoGPTQ 0.7.1, on CUDA only; the job: see `exchange.py`."""

from __future__ import annotations

import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from exchange import check_same_model, read_job


def main() -> None:
    """Do the job named on the command line."""
    job, tokens, logits = read_job()
    options = job["options"]
    config = BaseQuantizeConfig(
        bits=options["bits"],
        group_size=options["group_size"],
        damp_percent=options["damping"],
        desc_act=options["act_order"],
        sym=True,
    )
    model = AutoGPTQForCausalLM.from_pretrained(
        job["checkpoint"], config, torch_dtype=torch.float16
    )
    check_same_model(model.model.float(), tokens, logits)
    model.model.half()
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    model.quantize(examples, batch_size=1)
    model.save_quantized(job["output"])


if __name__ == "__main__":
    main()
