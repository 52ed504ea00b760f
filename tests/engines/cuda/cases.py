"""What the CUDA op set is asked of the cases of every op: those of compiled ops, in dtypes that they take."""

from __future__ import annotations

import torch

from engines.cuda import table
from tests.cases import Case, cases
from tests.csrc.cuda.emulated import HEAD_DIMS

OPS = table.parse(table.FULL).ops
LATENT_RANKS = OPS["latent_attention"]["kv_lora_rank"].values
ATTENTION = ("paged_attention", "quantized_attention")


def compiled() -> list[tuple[Case, torch.dtype]]:
    found = []
    for case in (case for case in cases() if case.op in OPS):
        for dtype in case.dtypes:
            allowed = OPS[case.op].get("dtype")
            if allowed is not None and not allowed.accepts(str(dtype).removeprefix("torch.")):
                continue
            if case.op in ATTENTION and case.arguments(dtype)[0].shape[2] not in HEAD_DIMS:
                continue
            if dtype == torch.float16 and case.name.endswith(", blocks of 32"):
                continue  # as the same case without, in the other dtype
            if case.op == "latent_attention" and case.arguments(dtype)[1].rank not in LATENT_RANKS:
                continue
            if dtype == torch.float16 and case.op in ("quantized_attention", "latent_attention"):
                continue  # test_quantized_kv.py and test_latent.py have it
            found.append((case, dtype))
    return found
