"""`python -m runner.docs`: docs/configuration.md from the schema, docs/support_matrix.md from families and engines.

With --check nothing is written: the exit code says whether the files are up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from runner import config, schema
from runner.help import EXIT_CODES, group_keys
from runner.schema import Key
from runner.support_matrix import render as support_matrix

FOLDER = config.PROJECT_FOLDER / "docs"
CONF = config.PROJECT_FOLDER / "conf"


def main(argv: Sequence[str]) -> int:
    pages = {"configuration.md": configuration(), "support_matrix.md": support_matrix()}
    old = [name for name, text in pages.items() if not _same(FOLDER / name, text)]
    if "--check" in argv:
        print(f"out of date: {', '.join(old)}; run python -m runner.docs" if old else "up to date")
        return 1 if old else 0
    for name in old:
        (FOLDER / name).write_text(pages[name], encoding="utf-8")
        print(f"written: docs/{name}")
    return 0


def configuration() -> str:
    """Every key: what it may be, its default, and what it means."""
    parts = [
        "# Configuration",
        "Made by `python -m runner.docs` from the dataclasses that check a configuration; not edited by hand. "
        "`python -m runner --help <group>` says the same.",
        "A job is composed of groups, each a folder of YAML files in `conf`. A choice is changed as in `model=minilm`, "
        "a key as in `sampling.temperature=0.7`, on the command line or in a YAML file of your own "
        "(`--config-dir <folder>`, laid out as `conf` is). Keys that a file leaves out have the default below.",
        "On the command line the grammar is Hydra's; what it cannot read, as `task.prompt='Label: {{ text }}'` or "
        "`dataset.filter=\"lang == 'en'\"`, is text as it stands. Quotes within quotes are for text with nothing but "
        "commas: `task.system='\"yes, or no\"'`. A list is in brackets: `sampling.stop=[END]`.",
        "Exit codes:\n\n" + "\n".join(f"- {code}" for line in EXIT_CODES.splitlines() for code in line.split("   ")),
    ]
    for section, (title, keys) in group_keys():
        group, _, option = section.partition(" ")
        parts.append(f"{'###' if option else '##'} {section}\n\n{title}.")
        files = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        if files and not option:
            parts.append(f"Options: {', '.join(f'`{name}`' for name in files)}.")
        if keys:
            parts.append(_table(keys, "" if section == "job" else f"{group}."))
    return "\n\n".join(parts) + "\n"


def _table(keys: Sequence[Key], prefix: str) -> str:
    rows = [("key", "may be", "default", "meaning"), ("---",) * 4]
    for key in keys:
        default = "required" if key.required else f"`{schema.default_words(key)}`".replace("``", "")
        rows.append((f"`{prefix}{key.name}`", schema.expected_words(key), default, key.doc))
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
