"""Names of jobs: stable, told apart, fit for a file system."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.naming import LONGEST, job_name, safe

CHOICES = {"model": "minilm", "dataset": "demo", "task": "embed", "sampling": "greedy"}


def test_a_single_job_is_called_after_its_choices_or_as_given() -> None:
    assert job_name(None, CHOICES, ["++seed=3"], sweep=False) == "minilm-demo-embed"
    assert job_name(None, dict.fromkeys(CHOICES, "demo"), [], sweep=False) == "demo"
    assert job_name("mine", CHOICES, ["++seed=3"], sweep=False) == "mine"


def test_a_job_of_a_sweep_says_what_was_overridden() -> None:
    overrides = ["model=minilm", "backend=cpu", "++sampling.temperature=0.5"]
    assert job_name(None, CHOICES, overrides, True) == "minilm-demo-embed,backend=cpu,sampling.temperature=0.5"
    assert job_name("x", CHOICES, overrides, True) == "x,backend=cpu,model=minilm,sampling.temperature=0.5"
    assert job_name("x", CHOICES, overrides[::-1], True) == job_name("x", CHOICES, overrides, True)


@pytest.mark.parametrize(
    "control",
    [
        *["mode=plan", "max_runtime_s=5", "grace_s=1", "retry_errors=true", "on_change=new", "++max_error_rate=1"],
        *["host=h200", "host.price_per_hour=2", "shard.index=3", "shard.count=64", "output.folder=/x", "name=y"],
        *["hydra.sweep.dir=z", "hydra/launcher=slurm"],
    ],
)
def test_what_only_steers_a_run_is_no_part_of_its_name(control: str) -> None:
    assert job_name("x", CHOICES, ["seed=1", control], True) == job_name("x", CHOICES, ["seed=1"], True)


@pytest.mark.parametrize("override", ["output=openai_batch", "output.token_ids=true", "~seed", "modes=1", "task=chat"])
def test_what_makes_another_job_is_part_of_its_name(override: str) -> None:
    assert job_name("x", CHOICES, [override], True) != job_name("x", CHOICES, [], True)


def test_credentials_are_no_part_of_a_name() -> None:
    assert "s3cr3t" not in job_name("x", CHOICES, ["++dataset.path=s3\\://k:s3cr3t@b/x"], True)


def test_names_that_lose_characters_stay_apart() -> None:
    assert safe("a=b,c_1.5-x") == "a=b,c_1.5-x"
    assert safe("a/b") != safe("a:b") != safe("a b")
    assert safe("x" * 300) != safe("x" * 301)


@given(st.text(), st.text())
def test_any_text_becomes_a_file_name(one: str, other: str) -> None:
    name = safe(one)
    assert len(name.encode()) <= LONGEST + 9 and not set(name) & set("/\\\0\n ") and not name.startswith(".")
    assert one == other or not one or not other or name != safe(other)
