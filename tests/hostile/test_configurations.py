"""Any configuration is a run, a plan or one message: never a stack trace, and nothing outside the job's folders."""

from __future__ import annotations

import copy
import os
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engines import discover
from runner import config, schema
from runner.errors import RunnerError
from runner.inspect import inspect
from runner.job import run
from runner.plan import make_plan
from tests.fake_engine import FakeEngine
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import write_rows, write_tokenizer

HOSTILE = [
    *("???", "${x}", "${oc.env:HOME}", "${oc.env:AWS_SECRET_ACCESS_KEY}", "${oc.decode:'1'}", "${oc.create:{a:1}}"),
    *("auto", "cuda", "triton", "cpu", "generate", "embed", "score", "classify", "chat", "plan", "verify", "invariant"),
    *("../../../etc/passwd", "/etc/shadow", "/dev/zero", "/proc/self/mem", "/", "~root/x", "pkg://os", "pkg://conf/x"),
    *("http://127.0.0.1:9/x", "zip::http://127.0.0.1:9/x", "s3://user:pass@nowhere/x", "file:///etc", "hf://x/y"),
    *("{{ ''.__class__ }}", "{{ text }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ text", "id > 3", "id >"),
    *(
        "text",
        "id",
        "x" * 10_000,
        "\x00",
        "a\nb",
        "\ud800",
        "é" * 300,
        "float16",
        "bfloat16",
        "int8",
        "parquet",
        "zstd",
    ),
    *(10**400, -(2**63), 2**63, 2**31, -1, 0, 1, 2, 3, 1e308, -0.0, 0.5, float("nan"), float("inf"), True, False, None),
]
SIMPLE = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=8) | st.sampled_from(HOSTILE)
JUNK = st.recursive(
    SIMPLE,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["_target_", "_args_", "name", "text"]), inner, max_size=3
        )
    ),
    max_leaves=4,
)


def all_keys() -> dict[tuple[str, ...], schema.Key]:
    """Every key of the schema, those of each task and engine among them."""
    found: dict[tuple[str, ...], schema.Key] = {}
    for backend in ("auto", "cpu", "triton", "cuda"):
        for task in config.task_modules().values():
            for key in config.job_keys(backend, task):
                found[key.name,] = key
                for inner in schema.keys(key.hint) if key.is_group else ():
                    found[key.name, inner.name] = inner
    return found


def allowed(key: schema.Key) -> st.SearchStrategy[Any]:
    """Values that a key may have by itself."""
    kinds = typing.get_args(key.hint) or (key.hint,)
    low, high = key.bounds.get("ge", key.bounds.get("gt", 0)), key.bounds.get("le", key.bounds.get("lt", 100))
    if choices := key.bounds.get("choices"):
        return st.sampled_from(choices)
    if bool in kinds:
        return st.booleans()
    if int in kinds:
        return st.integers(int(low), int(high)) | st.sampled_from([1, 2, 8, 64])
    if float in kinds:
        return st.floats(float(low), float(high))
    return st.sampled_from(["text", "id", "{{ text }}", "{{ id }}"]) | st.none() | st.text(max_size=10)


KEYS = all_keys()
ANY_KEY = st.sampled_from(sorted(KEYS))
SOUND = ANY_KEY.flatmap(lambda path: st.tuples(st.just(path), allowed(KEYS[path])))
UNSOUND = st.tuples(ANY_KEY | st.tuples(st.text(max_size=6)) | st.tuples(st.just("task"), st.text()), JUNK)
CHANGES = st.lists(SOUND, min_size=1, max_size=3) | st.lists(SOUND | UNSOUND, min_size=1, max_size=5)
"""Half of the configurations hold only what each key may be by itself."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(a folder of its own, the configuration of a job that runs there)"""
    folder = tmp_path_factory.mktemp("job")
    make_checkpoint({**discover.families()["llama"].tiny_config(), "vocab_size": 256}, folder / "model")
    write_tokenizer(folder / "model")
    write_rows(folder / "rows", [f"row {i}" for i in range(8)])
    with initialize_config_module("conf", version_base="1.3"):
        made = compose("config", overrides=["model=local", f"model.path={folder}/model", "dataset=local", "name=job"])
    tree: Any = OmegaConf.to_container(made, resolve=False)
    tree.pop("hydra", None)
    tree["dataset"]["path"] = str(folder / "rows")
    tree["task"] = {"name": "generate", "prompt": "{{ text }}"}
    tree["output"]["folder"] = str(folder / "out")
    return folder, tree


def _check(base: tuple[Path, dict[str, Any]], changes: list[tuple[tuple[str, ...], Any]]) -> str:
    """What came of it: "run", "plan" or the name of the error."""
    folder, tree = base[0], copy.deepcopy(base[1])
    for path, value in changes:
        node: Any = tree
        for group in path[:-1]:
            node = node.setdefault(group, {}) if isinstance(node.get(group, {}), dict) else {}
        node[path[-1]] = value
    try:
        made = OmegaConf.create(tree)
    except (OmegaConfBaseException, ValueError):  # no YAML file can say this
        return "no YAML"
    here = Path.cwd()
    os.chdir(folder)
    shutil.rmtree("out", ignore_errors=True)
    try:
        job = config.load(made)
        plan = make_plan(job)
        if job.mode == "plan":
            inspect(plan, plan_checkpoint(plan))
        elif str(plan.output_folder).startswith(str(folder)) and job.dataset.path != "/":
            run(plan, FakeEngine())
            return "run"
        return "plan"
    except RunnerError as error:
        said = str(error)
        assert error.exit_code in (2, 3, 4, 5, 6, 75) and "Traceback" not in said and len(said) < 20_000, said
        assert "; " in said or ": " in said, said
        return type(error).__name__
    finally:
        os.chdir(here)


def plan_checkpoint(plan: Any) -> Any:
    from engines.checkpoint import open_checkpoint

    return open_checkpoint(plan.settings.model_path)


OPTIONS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_the_job_itself_runs(base: Any) -> None:
    assert _check(base, []) == "run" and _check(base, [(("mode",), "plan")]) == "plan"


@settings(max_examples=200, **OPTIONS)
@given(changes=CHANGES)
def test_any_configuration_is_a_run_or_a_message(base: Any, changes: Any) -> None:
    _check(base, changes)


@pytest.mark.slow
@settings(max_examples=10_000, **OPTIONS)
@given(changes=CHANGES)
def test_ten_thousand_configurations(base: Any, changes: Any) -> None:
    _check(base, changes)


def test_every_key_is_tried() -> None:
    assert len(KEYS) > 70 and ("sampling", "temperature") in KEYS and ("task", "prompt") in KEYS


@pytest.mark.parametrize(
    "change",
    [{"_target_": "os.system"}, {"task": {"name": "embed", "_target_": "os.system", "_args_": ["touch owned"]}}],
)
def test_a_target_is_no_code(base: Any, change: dict[str, Any]) -> None:
    folder, tree = base
    with pytest.raises(RunnerError, match="_target_: no such key"):
        config.load(OmegaConf.create({**tree, **change}))
    assert not (folder / "owned").exists()
