"""What a whole job opens, starts and connects to, seen by Python's own audit hook in each of its processes.

Arrow and the tokenizers library open some files in native code, which the hook does not see: those of the input, which
runner/source/paths.py finds, and the checkpoint's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

HOOK = """
import json, os, sys
_log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_watched = ("open", "os.", "subprocess.", "socket.", "urllib.")
def _look(event, arguments):
    if event.startswith(_watched):
        os.write(_log, (json.dumps([event, [str(a) for a in arguments]]) + "\\n").encode(errors="replace"))
sys.addaudithook(_look)
"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def events_of(folder: Path, *arguments: str, code: int = 0) -> tuple[list[tuple[str, list[str]]], str]:
    """(events, what was printed) of `python -m runner` in that folder, its engine's process among them."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    log = folder / "audit.log"
    log.unlink(missing_ok=True)
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
        "PYTHONPATH": f"{folder / 'hook'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "AUDIT_LOG": str(log),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "runner", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    events: list[Any] = [json.loads(line) for line in log.read_text().splitlines()]
    return [(event, found) for event, found in events], done.stdout + done.stderr


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, list[str]]]]:
    """A job of the demo model over rows in a folder that holds traps, too."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "rows").mkdir()
    lines = [json.dumps({"text": text}) for text in ("one", "file:///etc/passwd", "http://127.0.0.1:9/x", "{{ 1 }}")]
    (folder / "rows" / "rows.jsonl").write_text("\n".join(lines))
    for name in ("conf.py", "torch.py", "model.py", "sitecustomize.py"):
        (folder / "rows" / name).write_text("raise SystemExit('code of the data was run')")
    (folder / "secret").write_text("nobody asked for this")
    given = ["dataset=local", "dataset.path=rows", "task=generate", "task.prompt='{{ text }}'", "sampling.max_tokens=4"]
    events, _ = events_of(folder, *given, "output.folder=out")
    assert list((folder / "out").rglob("*.parquet"))
    return folder, events


def opened(events: list[tuple[str, list[str]]], writing: bool) -> set[Path]:
    found = set()
    for event, arguments in events:
        if event == "open" and not arguments[0].isdigit():
            mode, flags = arguments[1], int(arguments[2]) if arguments[2].lstrip("-").isdigit() else 0
            writes = any(sign in mode for sign in "wax+") if mode != "None" else bool(flags & WRITING)
            if writes == writing:
                found.add(Path(os.path.normpath(arguments[0])))
    return found


def test_nothing_is_connected_to(job: Any) -> None:
    seen = {event for event, _ in job[1] if event.startswith(("socket.", "urllib."))}
    assert not seen & {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request"}, seen


def test_only_its_own_process_is_started(job: Any) -> None:
    # Triton asks that one for the driver's library where torch is built for CUDA.
    started = [args for event, args in job[1] if event == "subprocess.Popen" and args[0] != "/sbin/ldconfig"]
    assert started and all(one[0] == sys.executable and "engine_main" in one[1] for one in started), started
    others = {event for event, _ in job[1]} & {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"}
    assert not others


def test_only_the_output_folder_is_written(job: Any) -> None:
    folder, events = job
    allowed = (folder / "out", Path("out"), Path("/dev"), folder / "audit.log")
    # Files without a name are opened as their folder.
    temporary = {p for p in opened(events, True) if p == folder or (p.parent == folder and not p.exists())}
    wrong = {p for p in opened(events, True) - temporary if not any(p.is_relative_to(one) for one in allowed)}
    assert not wrong, wrong


def test_only_what_it_was_given_is_read(job: Any) -> None:
    folder, events = job
    system = ("/proc", "/sys", "/dev", "/usr", "/lib", "/etc", sys.prefix, sys.base_prefix, str(ROOT))
    places = (*system, sysconfig.get_path("stdlib"), str(folder / "hook"), str(folder / "rows"), str(folder / "out"))
    files = {p for p in opened(events, False) if p.is_absolute() and not str(p).startswith(places)}
    assert not {p for p in files if p.exists()}, files
    read = {p.name for p in opened(events, False)}
    assert "config.json" in read and "secret" not in read and "passwd" not in read
    assert not {p for p in opened(events, False) if p.suffix == ".py" and p.is_relative_to(folder / "rows")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dataset=local", "dataset.path=http://127.0.0.1:9/rows.jsonl"], "dataset.remote"),
        (["dataset=local", "dataset.path=s3://bucket/rows.jsonl"], "dataset.remote"),
        (["dataset=local", "dataset.path=zip::http://127.0.0.1:9/rows.zip"], "dataset.remote"),
        (["+_target_=os.system"], "_target_"),
        (["task._target_=os.system"], "_target_"),
        (["task.prompt=${oc.env:SECRET_TOKEN}"], "SECRET_TOKEN"),
        (["task.prompt=${eval:1}"], "eval"),
        (["model=local", "model.path=model"], "pickles"),
        (["model=local", "model.path=coded"], "trust_remote_code"),
    ],
)
def test_what_needs_a_word_of_its_own_names_it(tmp_path: Path, arguments: list[str], said: str) -> None:
    for name, config in {
        "model": {"architectures": ["LlamaForCausalLM"]},
        "coded": {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.Own"}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    (tmp_path / "coded" / "own.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    (tmp_path / "coded" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    events, printed = events_of(tmp_path, *arguments, code=_code(arguments))
    assert said in printed and "Traceback" not in printed
    seen = {event for event, _ in events}
    assert not seen & {"socket.connect", "os.system", "subprocess.Popen"} and not (tmp_path / "owned").exists()


def _code(arguments: list[str]) -> int:
    return 3 if "model.path=model" in arguments else 5 if "model.path=coded" in arguments else 2
