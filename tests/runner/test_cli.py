"""The command line: exit codes, one message and no stack trace, sweeps, what is imported and what is written."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runner.__main__ as cli
from runner import config
from runner.config import JobConfig
from runner.errors import EngineError, Interrupted, OutputError
from tests.conftest import ROOT


def run_cli(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "runner", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[JobConfig]:
    """The jobs that reach the runner, in place of running them."""
    seen: list[JobConfig] = []
    monkeypatch.setattr(cli, "_run", lambda job: seen.append(job) or 0)
    monkeypatch.chdir(tmp_path)
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, by_seed: dict[int, BaseException], seen: list[JobConfig]) -> None:
    def run(job: JobConfig) -> int:
        seen.append(job)
        if job.seed in by_seed:
            raise by_seed[job.seed]
        return 0

    monkeypatch.setattr(cli, "_run", run)


# Messages, in processes of their own: what a person sees.


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["modle=demo"], 2, "did you mean model?"),
        (["model=demp"], 2, "model: no option 'demp'; expected one of "),
        (["-m", "model=demo,demp"], 2, "did you mean demo?"),
        (["model.dtype=bf16"], 2, "did you mean bfloat16?"),
        (["sampling.stop=['a'"], 2, "put quotes within quotes"),
        (["task.prompt=Yes, or no?"], 2, "as in task.prompt='\"one, text\"'"),
        (["seed=1,2"], 2, "add --multirun"),
        (["model=demo,minilm"], 2, "add --multirun"),
        (["--config-dir", "nowhere"], 2, "--config-dir: 'nowhere' is no folder"),
        (["--config-name", "nothing"], 2, "--config-name: 'nothing' is not found"),
        (["--help", "modle"], 2, "did you mean model?"),
        (["--no-such-flag"], 2, "unrecognized arguments"),
        (["--cfg", "job", "-m"], 2, "together with"),
        (["hydra/launcher=slrm"], 2, "hydra/launcher: no option 'slrm'; expected one of basic"),
    ],
)
def test_mistakes_are_one_message(args: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = run_cli(*args, cwd=tmp_path)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr + done.stdout
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == ({"outputs/.sweep/multirun.yaml"} if args[0] == "-m" else set())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.prompt", "Label: {{ text }}"),
        ("task.prompt", "{{ a }}, {{ b }}\n="),
        ("task.prompt", "It's \\ a \"text\" of {{ 'quotes\\'' }} \\"),
        ("dataset.filter", "lang == 'en' and score >= 0.5"),
    ],
)
def test_text_that_is_no_value_of_hydra_is_taken_as_it_stands(key: str, value: str, jobs: list[JobConfig]) -> None:
    assert cli.command_line([f"{key}={value}"]) == 0
    group, name = key.split(".")
    assert getattr(getattr(jobs[0], group), name) == value


def test_in_a_sweep_too(jobs: list[JobConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command_line(["-m", "task.prompt=Label: {{ text }}", "seed=1,2"]) == 0
    assert [(job.task.prompt, job.seed) for job in jobs] == [("Label: {{ text }}", 1), ("Label: {{ text }}", 2)]
    assert cli.command_line(["-m", "task.prompt={{ a }},{{ b }}"]) == 2
    assert "put quotes within quotes" in capsys.readouterr().err


def shown_commands() -> list[list[str]]:
    """The arguments of each command that a page shows, as a shell gives them; `...` and `<...>` stand for more."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "jobs/examples/README.md"]
    found = []
    for page in sorted(pages):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ {4}python -m runner(?: (.*))?$", re.sub(r"<[a-z]+>", "mine", text), re.MULTILINE):
            found.append([word for word in shlex.split(line, comments=True) if word != "..."])
    inline = re.findall(r"\*\* `([a-z_.]+=[^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    found += [shlex.split(code) for code in inline]
    return [words for words in found if "hydra/launcher" not in "".join(words)]


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_commands_of_the_documentation_are_understood(words: list[str], jobs: list[JobConfig]) -> None:
    words = [str(ROOT / word) if word == "jobs" else word for word in words]
    assert cli.command_line(words) == 0 and (jobs or "--help" in words)


def test_broken_yaml_of_the_user_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("path: [x")
    done = run_cli("--config-dir", ".", "model=mine", cwd=tmp_path)
    assert done.returncode == 2 and "mine.yaml" in done.stderr and "Traceback" not in done.stderr


def test_help_names_groups_keys_and_options(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("path: x")
    overview = run_cli("--help", "--config-dir", ".", cwd=tmp_path)
    for group in ("model", "backend_config", "parallelism", "dataset", "task", "sampling", "output", "host"):
        assert f"\n  {group} " in overview.stdout
    assert overview.returncode == 0 and "mine" in overview.stdout and "max_runtime_s: a number" in overview.stdout
    everything = run_cli("--help", "all", cwd=tmp_path)
    assert "sampling.top_p: a number, more than 0 and at most 1; default 1.0" in everything.stdout


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m runner --help all | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "job: Keys of every job\n" and done.stderr == ""


def test_shell_completion_completes_options(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "batch-runner host=h200"}
    done = subprocess.run(
        [sys.executable, "-m", "runner", "--shell-completion", "query=bash"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["host=h200", "host=h200x8"]


def test_printed_configuration_is_masked(tmp_path: Path) -> None:
    done = run_cli("--cfg", "job", "dataset.path=s3://key:s3cr3t@bucket/x", cwd=tmp_path)
    assert done.returncode == 0 and "s3://***@bucket/x" in done.stdout and "s3cr3t" not in done.stdout


@pytest.mark.parametrize("args", [["--help"], ["--help", "all"], ["modle=x"], ["model=nope"], ["--cfg", "job"]])
def test_no_torch(args: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; from runner.__main__ import command_line\n"
        f"command_line({args!r})\n"
        "print('LOADED', sorted({'torch', 'transformers', 'triton', 'datasets'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("LOADED []\n")


def test_environment_report_says_why_engines_cannot_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_" + "x1" * 17, "HF_ENDPOINT": "http://u:p@h"}
    done = subprocess.run(
        [sys.executable, "-m", "runner.env"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    for word in ("torch ", "Machine:", "  cuda ", "  triton ", "  cpu ", "HF_ENDPOINT=http://***@h"):
        assert word in done.stdout
    assert "hf_x1" not in done.stdout


# Composition and sweeps, in this process.


def test_the_launch_line(jobs: list[JobConfig]) -> None:
    assert cli.command_line(["model=minilm", "backend=auto", "sampling.max_tokens=8", "shard.count=4"]) == 0
    (job,) = jobs
    assert (job.name, job.backend, job.sampling.max_tokens, job.shard.count) == ("minilm-demo", "auto", 8, 4)
    assert list(Path().iterdir()) == []


def test_keys_that_a_short_file_leaves_out_can_be_set(jobs: list[JobConfig]) -> None:
    Path("dataset").mkdir()
    Path("dataset/reviews.yaml").write_text("path: reviews.jsonl\n")
    args = ["--config-dir", ".", "dataset=reviews", "dataset.limit=5", "model.adapters.fr=lora/fr", "name=x"]
    args.append("model.adapter=fr")
    assert cli.command_line(args) == 0
    assert jobs[0].dataset.path == "reviews.jsonl" and jobs[0].dataset.limit == 5
    assert jobs[0].model.adapters == {"fr": "lora/fr"}


def test_a_saved_configuration_runs_again(jobs: list[JobConfig]) -> None:
    assert cli.command_line(["name=first", "seed=7", "sampling=diverse"]) == 0
    Path("first").mkdir()
    Path("first/config.yaml").write_text(config.to_yaml(jobs[0]))
    assert cli.command_line(["--config-dir", "first"]) == 0
    assert jobs[1] == jobs[0]
    assert [path.name for path in Path().iterdir()] == ["first"]


def test_a_sweep_gives_each_job_its_own_stable_name(jobs: list[JobConfig], capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["-m", "model=demo,minilm", "backend=auto,cpu", "max_runtime_s=60"]
    assert cli.command_line(sweep) == 0
    first = [job.name for job in jobs]
    assert first == ["demo,backend=auto", "demo,backend=cpu", "minilm-demo,backend=auto", "minilm-demo,backend=cpu"]
    assert [job.backend for job in jobs] == ["auto", "cpu"] * 2
    assert cli.command_line([*sweep[:-1], "max_runtime_s=5", "mode=plan"]) == 0
    assert [job.name for job in jobs[4:]] == first
    assert [path.as_posix() for path in Path().rglob("*") if path.is_file()] == ["outputs/.sweep/multirun.yaml"]
    assert "4 of 4 jobs done" in capsys.readouterr().err


def test_shards_of_a_sweep_are_one_job(jobs: list[JobConfig]) -> None:
    assert cli.command_line(["-m", "shard.count=3", "shard.index=range(3)", "name=big"]) == 0
    assert [(job.name, job.shard.index) for job in jobs] == [("big", 0), ("big", 1), ("big", 2)]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({2: EngineError("no engine")}, 5),
        ({1: Interrupted("out of time"), 3: OutputError("another job's")}, 4),
        ({1: Interrupted("out of time")}, 75),
        ({2: ValueError("a defect")}, 70),
    ],
)
def test_a_failing_job_hides_no_other(
    errors: dict[int, BaseException],
    expected: int,
    jobs: list[JobConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, errors, jobs)
    assert cli.command_line(["-m", "seed=1,2,3", "name=x"]) == expected
    said = capsys.readouterr().err
    assert [job.seed for job in jobs] == [1, 2, 3]
    assert f"{3 - len(errors)} of 3 jobs done" in said and "Traceback" not in said
    for error in errors.values():
        assert str(error) in said


def test_a_signal_ends_the_sweep(jobs: list[JobConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {2: Interrupted("SIGTERM", signal.SIGTERM)}, jobs)
    assert cli.command_line(["-m", "seed=1,2,3", "name=x"]) == 75
    assert [job.seed for job in jobs] == [1, 2]


def test_a_real_interrupt_before_the_job_begins(jobs: list[JobConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(job: JobConfig) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(200):  # the system may give the signal to another thread, which passes it on a moment later
            time.sleep(0.05)

    monkeypatch.setattr(cli, "_run", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert cli.command_line(["name=x"]) == 75
    finally:
        signal.signal(signal.SIGINT, before)


def test_credentials_of_a_sweep_are_not_recorded(jobs: list[JobConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command_line(["-m", "seed=1,2", "dataset.path=s3://key:s3cr3t@bucket/x"]) == 0
    assert jobs[0].dataset.path == "s3://key:s3cr3t@bucket/x"
    assert "s3cr3t" not in Path("outputs/.sweep/multirun.yaml").read_text() + "".join(capsys.readouterr())
    assert "s3cr3t" not in jobs[0].name


def test_a_defect_is_one_line_and_a_log(
    jobs: list[JobConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, {0: RuntimeError("of hf_" + "a1" * 15)}, jobs)
    assert cli.command_line(["name=x"]) == 70
    said = capsys.readouterr().err
    assert said.startswith(
        "internal error: RuntimeError: of ***; this is a defect of the runner; see outputs/x/error.log"
    )
    log = Path("outputs/x/error.log").read_text()
    assert "Traceback" in log and "in run" in log and "hf_a1" not in log


def test_jobs_can_be_pickled_for_other_machines() -> None:
    function: Callable[..., int] = cli.run_one
    assert (function.__module__, function.__qualname__) == ("runner.__main__", "run_one")


OVERRIDES = [
    *[
        "model=demo",
        "sampling.n=1",
        "sampling.stop=['a','b']",
        "dataset.path=x",
        "seed=1,2",
        "backend=cpu",
        "host=h200",
    ],
    *["mode=plan", "task.prompt='{{ text }}'", "++sampling.temperature=1", "~seed", "shard.index=range(2)", "name=x"],
]
SIGNS = "=,.+~@'\"{}[]$\\ü\n ?1/:()"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(OVERRIDES), min_size=1, max_size=3, unique=True), st.booleans(), st.randoms())
def test_any_command_line_runs_or_is_a_message(
    jobs: list[JobConfig], overrides: list[str], sweep: bool, random: Random
) -> None:
    """Command lines with a sign put in or in place of another, here and there."""
    for index, text in enumerate(overrides):
        at = random.randrange(1, len(text) + 1)
        overrides[index] = text[:at] + random.choice(SIGNS) + text[at + random.randint(0, 1) :]
    assert cli.command_line(["-m", *overrides] if sweep else overrides) in (0, 2)
