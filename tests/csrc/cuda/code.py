"""What nvcc made of the kernels: registers and spills as ptxas reports them, instructions as cuobjdump lists them.

`python -m tests.csrc.cuda.code <folder of a build>` writes the table that test_code.py compares with.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from csrc import cuda_build

TABLE = Path(__file__).parent / "registers.json"
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def version() -> str:
    """The compiler's, which registers depend on."""
    compiler = cuda_build.nvcc() or ""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return ".".join(map(str, cuda_build.nvcc_version(text) or ()))


def kernels(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> registers, stack and spilled bytes."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for report in sorted(folder.glob("*.ptxas")):
        name = arch = ""
        entry: dict[str, int] = {}
        for line in report.read_text("utf-8").splitlines():
            if match := ENTRY.search(line):
                name, arch, entry = match[1], match[2], {}
            elif match := SPILLS.search(line):
                entry |= {"stack_bytes": int(match[1]), "spill_bytes": int(match[2]) + int(match[3])}
            elif (match := REGISTERS.search(line)) and name:
                found.setdefault(arch, {})[name] = entry | {"registers": int(match[1])}
                name = ""
    return {arch: _readable(own) for arch, own in found.items()}


def _readable(own: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    names = subprocess.run(["c++filt"], input="\n".join(own), capture_output=True, text=True, check=True).stdout
    # Of "void cuda_ops::kernel<cuda_ops::Tile<__half, 64, (cuda_ops::Form)1> >(cuda_ops::Params)" without (Params).
    short = [name.removeprefix("void ") for name in names.splitlines()]
    short = [name.rpartition(">(")[0] + ">" if ">(" in name else name for name in short]
    short = [re.sub(r"\((int|bool|cuda_ops::\w+)\)|cuda_ops::", "", name).partition("(")[0] for name in short]
    short = [name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace(" >", ">") for name in short]
    return dict(sorted(zip(short, own.values(), strict=True)))


def cuobjdump() -> Path | None:
    """The one that the triton package carries."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return path if path.is_file() else None


def instructions(program: Path, compiled: Path, arch: str) -> str:
    """The machine code of an object file for one architecture."""
    command = [str(program), "--dump-sass", "--gpu-architecture", arch, str(compiled)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop(text: str, kernel: str, instruction: str) -> list[str]:
    """The shortest loop of a kernel's machine code that has such an instruction. kernel: part of the name as linked."""
    (own,) = [part for part in text.split("Function : ")[1:] if kernel in part.split("\n")[0]]
    code = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(\S[^;]*);", own)]
    places = {at: i for i, (at, _) in enumerate(code)}
    found = []
    for i, (at, what) in enumerate(code):
        back = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", what)
        if back and int(back[1], 16) < at:
            found.append([name for _, name in code[places[int(back[1], 16)] : i + 1]])
    return min((body for body in found if any(instruction in name for name in body)), key=len)


def main(folder: Path) -> None:
    table = {
        arch: {name: entry["registers"] for name, entry in own.items()} for arch, own in sorted(kernels(folder).items())
    }
    TABLE.write_text(json.dumps({"nvcc": version(), "registers": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
