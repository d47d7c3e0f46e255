"""The tasks measure gives what lm-eval's own command line gives on the same checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.peers.lm_eval_compare import EQUALITY, TOLERANCE, equality

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("QUANTBENCH_SHARED", str(ROOT.parent / "shared")))
MODEL, DATA = SHARED / "models" / "wiki6m", SHARED / "datasets"


@pytest.mark.skipif(
    not (MODEL.is_dir() and DATA.is_dir()),
    reason="the model wiki6m and the data sets are not on this machine (QUANTBENCH_SHARED)",
)
def test_every_decision_is_lm_evals_own(tmp_path: Path) -> None:
    found = equality(MODEL, DATA, tmp_path)
    assert {task for task, _ in found} == {task for task, _, _ in EQUALITY}
    assert found["hellaswag", "acc_norm"].compared == 500
    assert found["mmlu", "acc"].compared == 57 * 9
    assert found["gsm8k", "exact_match_strict"].compared == 50
    for (task, _), one in found.items():
        assert one.unexplained == 0
        if task == "gsm8k":
            assert (one.differing, one.texts) == (0, 0)
        else:
            assert one.largest is not None
            assert one.largest < TOLERANCE
