"""The house rules that no linter knows: who imports whom, what loads torch, sizes of files, links that lead."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("runner/**/*.py"), *ROOT.glob("engines/**/*.py")])
HEAVY = ("torch", "transformers", "triton", "datasets")
BACKENDS = ("cpu", "triton", "cuda")


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Dotted names that a file imports; `if TYPE_CHECKING` blocks do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def of(names: set[str], *prefixes: str) -> list[str]:
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in prefixes))


def test_engines_know_nothing_of_the_runner() -> None:
    offenders = {module(p): of(imports(p), "runner") for p in SOURCES if module(p).startswith("engines")}
    assert not {name: found for name, found in offenders.items() if found}


@pytest.mark.parametrize("leaf", ["engines.api", "engines.discover", "runner.errors", "runner.chunk"])
def test_leaves_import_nothing_of_ours(leaf: str) -> None:
    path = ROOT / (leaf.replace(".", "/") + ".py")
    assert not of(imports(path), "engines", "runner")


def test_families_import_their_spec_only() -> None:
    own = {"base", "decoder", "encoder", "load", "spec", "transformers_model", "__init__"}
    families = [p for p in ROOT.glob("engines/models/*.py") if p.stem not in own]
    assert len(families) >= 10
    for path in families:
        others = [n for n in of(imports(path), "engines") if not n.startswith("engines.models.spec")]
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_do_not_import_each_other(backend: str) -> None:
    for path in ROOT.glob(f"engines/{backend}/**/*.py"):
        others = [f"engines.{b}" for b in BACKENDS if b != backend]
        assert not of(imports(path), *others), path
        assert not of(imports(path), "engines.core", "engines.models", "engines.layers"), path


@pytest.mark.parametrize(
    "lower, higher", [("ops", "formats"), ("formats", "models"), ("layers", "core"), ("models", "core")]
)
def test_layers_of_the_engine(lower: str, higher: str) -> None:
    for path in ROOT.glob(f"engines/{lower}/**/*.py"):
        assert not of(imports(path), f"engines.{higher}"), path


def test_no_family_is_named_in_the_shared_decoder() -> None:
    text = (ROOT / "engines/models/decoder.py").read_text("utf-8").lower()
    names = [p.stem for p in ROOT.glob("engines/models/*.py")]
    families = set(names) - {"base", "decoder", "encoder", "load", "spec", "transformers_model", "__init__"}
    assert not [name for name in families if re.search(rf"\b{name}", text)]
    assert len(text.splitlines()) <= 200


@pytest.mark.parametrize(
    "name",
    ["runner.plan", "runner.config", "runner.job", "runner.__main__", "engines.capability", "engines.models.llama"],
)
def test_plans_and_messages_come_without_torch(name: str) -> None:
    code = f"import sys, {name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]", f"import {name} loads {done.stdout}"


def test_files_fit_in_a_head() -> None:
    long = {module(p): n for p in SOURCES if (n := len(p.read_text("utf-8").splitlines())) > 600}
    assert not long


def test_links_in_the_documents_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("jobs/**/*.md"), ROOT / "outputs/README.md"]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
