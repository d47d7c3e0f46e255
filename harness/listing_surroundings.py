"""Makes what listings of the documents expect beside them, small enough for any machine.

Usage: `python -m harness.listing_surroundings FOLDER`; `harness.listings` calls it once a run. No
weight is fetched: the Llama is the embedded model, the others have random weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from harness.listing_probes.nanogpt_model import GPT, GPTConfig
from harness.nanogpt_vocabulary import write_meta
from methods import gguf_export

EMBEDDED = Path(__file__).parent / "embedded" / "model"
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The 65 characters of nanoGPT's Shakespeare."""

SHAKESPEARE = GPTConfig(
    block_size=256, vocab_size=len(CHARACTERS), n_layer=6, n_head=6, n_embd=384, bias=False
)
"""config/train_shakespeare_char.py of nanoGPT."""


def make(folder: Path) -> None:
    """Write every surrounding into `folder`, each under its name in `harness/listings.yaml`."""
    torch.manual_seed(0)
    shutil.copytree(EMBEDDED, folder / "llama")
    _tokenizer_for_all(folder / "llama")
    _gpt2(folder / "gpt2")
    shutil.copy(Path(__file__).parent / "listing_probes" / "nanogpt_model.py", folder / "nanogpt")
    torch.save(GPT(GPTConfig()).state_dict(), folder / "weights")
    _checkpoint(folder / "checkpoint")
    write_meta(CHARACTERS, folder / "meta")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        EMBEDDED, dtype=torch.float16, local_files_only=True
    )
    gguf_export.export(model, tokenizer, folder / "gguf", "float16")


def _gpt2(folder: Path) -> None:
    """Write a GPT-2 of twelve blocks, 128 wide, so that groups of 128 fit."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=128,
        n_layer=12,
        n_head=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _tokenizer_for_all(folder)


def _tokenizer_for_all(folder: Path) -> None:
    """Name the tokenizer's class as transformers before version 5 does, too."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config), encoding="utf-8")


def _checkpoint(path: Path) -> None:
    """Write a checkpoint as nanoGPT leaves it after one step, with the optimizer's state."""
    model = GPT(SHAKESPEARE)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, SHAKESPEARE.vocab_size, (1, 8))
    _, loss = model(ids, ids)
    loss.backward()
    optimizer.step()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": asdict(SHAKESPEARE),
            "iter_num": 1,
            "best_val_loss": loss.detach(),
            "config": {},
        },
        path,
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
