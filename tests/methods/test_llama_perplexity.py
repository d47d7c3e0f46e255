"""Our perplexity under llama.cpp's protocol against that of llama.cpp's own tool, where it is here.

Put `llama-perplexity` of the same llama.cpp on the PATH to run it; pip's build does not bring it.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.measures.perplexity import Perplexity
from tests.harness.measures.surroundings import make_context
from tests.methods.gguf_models import byte_level_tokenizer, tiny_kind
from tests.methods.machine import Machine

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

TOOL = shutil.which("llama-perplexity")
WINDOW = 64
WINDOWS = 12
SAME = 0.001


@pytest.mark.skipif(TOOL is None, reason="llama-perplexity is not on the PATH")
@pytest.mark.parametrize("bos", [False, True])
def test_equals_what_llama_cpp_itself_reports(bos: bool, tmp_path: Path) -> None:
    import torch

    from harness.data import encode, leading_token
    from methods.gguf import FILE, Gguf, load_file

    tokenizer = byte_level_tokenizer((), add_bos=bos)
    words = random.Random(5)
    text = " ".join(words.choice(["the", "and", "naïve", "42", "\n", "It"]) for _ in range(3000))
    model = tiny_kind("llama", {"vocab_size": len(tokenizer), "max_position_embeddings": WINDOW})
    Gguf("gguf_F16", "F16").quantize(model, tokenizer, None, tmp_path)
    (tmp_path / "text.raw").write_text(text)
    lead = leading_token(tokenizer)
    ids = [*([] if lead is None else [lead]), *encode(tokenizer, text)]
    context = make_context(tmp_path, torch.tensor(ids), lead)
    engine = load_file(tmp_path, Machine())
    (ours,) = Perplexity("llamacpp", seq_len=WINDOW, windows=WINDOWS).run(engine, context)
    engine.close()
    command = [str(TOOL), "-m", str(tmp_path / FILE), "-f", str(tmp_path / "text.raw")]
    command += ["-c", str(WINDOW), "--chunks", str(WINDOWS), "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found is not None, done.stderr
    assert ours.value == pytest.approx(float(found[1]), rel=SAME)
