"""The plan must not hide that an engine has never run where it is to run."""

from __future__ import annotations

import json
from pathlib import Path

from engines.gpu_ledger import unseen


def test_an_engine_that_no_gpu_has_run_says_so(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    ledger.write_text(json.dumps({"triton: paged_attention": {}}))
    assert unseen("triton", ledger) is None
    assert unseen("cuda", ledger) == (
        "no GPU has run its kernels yet: they were compiled, and checked on a processor; try a few rows first"
    )
    assert unseen("cpu", ledger) is None
