"""Every case of every compiled op once, for a child process whose library is built otherwise than usual."""

from __future__ import annotations

from pathlib import Path

import torch

from engines import extension
from engines.cpu.opset import OpSet
from engines.ops import origin
from tests.attention_cases import stored
from tests.blocks import runs
from tests.cases import call, cases


def main() -> None:
    assert extension.LIBRARY.resolve().parents[1] == Path.cwd().resolve(), "another checkout's library"
    torch.set_num_threads(2)
    ops, count = OpSet(), 0
    for case in cases():
        if origin(ops, case.op).startswith("engines.cpu."):
            for dtype in case.dtypes:
                arguments = case.arguments(dtype)
                if case.op == "paged_attention":
                    arguments = (arguments[0], stored(ops, arguments[1]), *arguments[2:])
                call(ops, case, arguments)
                count += 1
    for found, residual, expected, _ in runs(ops):
        assert torch.equal(found, expected), residual
        count += 1
    print(count, "calls")


if __name__ == "__main__":
    main()
