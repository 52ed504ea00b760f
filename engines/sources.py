"""Which sources a compiled library was built from. Shared with setup.py, so nothing but the standard library here."""

from __future__ import annotations

import hashlib
from pathlib import Path

MARK = "cpu_ops sources "
"""The library holds this and the digest as text, csrc/cpu/isa.cpp."""


def digest(folder: Path) -> str:
    """Of names and contents of the C++ files in a folder: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cpp", ".h"):
            content = path.read_bytes()
            found.update(f"{path.name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]
