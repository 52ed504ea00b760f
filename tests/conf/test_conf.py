"""Every YAML file that is shipped composes, loads, is commented, and says what the schema says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from engines.platform import describe
from runner import config, schema
from runner.config import load
from tests.conftest import ROOT

CONF = ROOT / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("__pycache__", "hydra"))
OPTIONS = [(path.parent.name, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
FILES = sorted(path for path in CONF.rglob("*.yaml") if "hydra" not in path.parts)
EXAMPLES = sorted((ROOT / "jobs" / "examples").glob("*.yaml"))
GIVEN = {
    "model": ["++model.path=models/x"],
    "dataset": ["++dataset.path=rows.parquet"],
    "parallelism": ["mode=plan"],
    "host": ["mode=plan"],
}
"""What a person adds to an option of these groups: the keys that are ??? in some, the mode that some need."""
COMPLETE = [
    ("model", "local"),
    ("backend_config", "auto"),
    ("backend_config", "cpu"),
    ("parallelism", "single"),
    ("dataset", "local"),
    ("sampling", "greedy"),
    ("output", "parquet"),
]
"""Files that document their group: they have every key, with its default."""


@pytest.fixture
def composer() -> Iterator[None]:
    with initialize_config_module("conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=["name=test", *overrides])


def required(cls: Any, group: str, cfg: DictConfig) -> list[str]:
    """Overrides for the keys of a task that its YAML leaves to the user."""
    values = {name for name in cfg[group] if not OmegaConf.is_missing(cfg[group], name)}
    return [f"++{group}.{key.name}=x" for key in schema.keys(cls) if key.required and key.name not in values]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_and_loads(composer: None, group: str, option: str) -> None:
    overrides = [f"{group}={option}", *GIVEN.get(group, [])]
    if group == "task":
        cfg = composed(*overrides)
        overrides += required(config.task_modules()[cfg.task.name].Config, "task", cfg)
    job = load(composed(*overrides))
    assert job.name == "test"


def test_the_default_is_the_demo(composer: None) -> None:
    job = load(composed())
    assert (job.model.path, job.backend, job.samples, job.mode) == ("project:jobs/demo/model", "auto", 1, "run")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_composes_and_loads(composer: None, example: Path) -> None:
    load(composed(f"hydra.searchpath=[file://{example.parent.parent}]", f"+{example.parent.name}={example.stem}"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_has_a_comment(file: Path) -> None:
    """At most two keys to a comment. What a file inherits and changes is documented where it is inherited from."""
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "the first line says what the file is"
    if "defaults:" in lines and file.parent != CONF:
        return
    since_comment = 0
    for line in lines:
        since_comment = 0 if "#" in line else since_comment + (line[:1].isalpha() and not line.startswith("name:"))
        assert since_comment <= 2, line


@pytest.mark.parametrize(("group", "option"), COMPLETE)
def test_complete_files_have_every_key_with_its_default(composer: None, group: str, option: str) -> None:
    values = OmegaConf.to_container(composed(f"{group}={option}")[group], throw_on_missing=False)
    assert isinstance(values, dict)
    engine = values.pop("name", None) if group == "backend_config" else None
    known = {key.name: key for key in config.job_keys(engine or "auto")}[group].hint
    for key in schema.keys(known):
        default = schema.MISSING if key.required else key.default
        expected = list(default) if isinstance(default, tuple) else default
        if group != "sampling" or key.name not in ("n", "columns"):
            assert values[key.name] == expected, key.name
    assert set(values) == {key.name for key in schema.keys(known)}


def test_job_level_keys_have_their_defaults(composer: None) -> None:
    cfg = composed()
    for key in config.job_keys():
        if not key.is_group and not key.required:
            assert cfg[key.name] == key.default, key.name
    assert cfg.shard == dataclasses.asdict(config.ShardConfig())


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "host" and option != "this"])
def test_described_hosts_say_what_a_plan_needs(composer: None, option: str) -> None:
    host = describe(**dataclasses.asdict(load(composed(f"host={option}", "mode=plan")).host))
    assert host.name == option and host.memory_bytes and host.bytes_s and host.flops_16bit and host.flops_32bit
    assert (host.compute_capability is not None) == (host.device == "cuda") == (host.cuda is not None)


def test_every_task_and_every_engine_has_a_file() -> None:
    tasks = {yaml.safe_load(path.read_text())["name"] for path in (CONF / "task").glob("*.yaml") if path.stem != "demo"}
    assert tasks == set(config.task_modules())
    assert {path.stem for path in (CONF / "backend_config").glob("*.yaml")} == set(config.ENGINE_NAME.bounds["choices"])
