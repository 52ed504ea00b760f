"""load: what it accepts, and the words of each refusal."""

from __future__ import annotations

import copy
import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engines.api import EngineConfig, SamplingParams
from engines.cpu.offers import Config as CpuConfig
from runner import config, schema
from runner.config import JobConfig, TaskConfig, load, resolve_path, to_yaml
from runner.docs import FOLDER, configuration
from runner.errors import ConfigError
from runner.secrets import mask


@dataclasses.dataclass(frozen=True)
class Prompted(TaskConfig):
    prompt: str
    suffix: str | None = None


@dataclasses.dataclass(frozen=True)
class Embedding(TaskConfig):
    text: str = "text"


TASKS = {
    "generate": types.SimpleNamespace(Config=Prompted, KIND="generate"),
    "embed": types.SimpleNamespace(Config=Embedding, KIND="embed"),
}
BASE: dict[str, Any] = {
    "name": "test",
    "model": {"path": "models/x"},
    "dataset": {"path": "rows.parquet"},
    "task": {"name": "generate", "prompt": "{{ text }}"},
    "sampling": {},
    "backend_config": {},
}


@pytest.fixture(autouse=True)
def two_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks with known keys, so that these tests speak of load alone."""
    monkeypatch.setattr(config, "task_modules", lambda: TASKS)


def tree(**changes: Any) -> dict[str, Any]:
    """BASE with dotted keys changed, written with __ for the dot."""
    made = copy.deepcopy(BASE)
    for path, value in changes.items():
        *groups, name = path.split("__")
        node = made
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return made


def job(**changes: Any) -> JobConfig:
    return load(OmegaConf.create(tree(**changes)))


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        job(**changes)
    return str(caught.value)


def test_what_is_left_out_has_its_default() -> None:
    made = job()
    assert made == JobConfig(
        "test",
        config.ModelConfig("models/x"),
        config.DatasetConfig("rows.parquet"),
        Prompted("generate", "{{ text }}"),
        SamplingParams(),
        EngineConfig(),
    )
    assert type(made.sampling) is SamplingParams


def test_values_become_the_types_of_their_fields() -> None:
    made = job(
        name=2024,
        sampling__temperature=1,
        sampling__stop=["\n", "."],
        sampling__n=3,
        sampling__columns={"max_tokens": "budget"},
        host__cuda=13.0,
        mode="plan",
        output__keep_columns=["id"],
        max_runtime_s=5,
    )
    assert (made.name, made.samples, made.sampling_columns) == ("2024", 3, {"max_tokens": "budget"})
    assert made.sampling.stop == ("\n", ".") and made.output.keep_columns == ["id"] and made.host.cuda == "13.0"
    assert isinstance(made.sampling.temperature, float) and isinstance(made.max_runtime_s, float)


@pytest.mark.parametrize(
    ("backend", "group", "expected", "cls"),
    [
        ("auto", "auto", "auto", EngineConfig),
        ("auto", "cpu", "cpu", CpuConfig),
        ("cpu", "auto", "cpu", CpuConfig),
        ("cpu", "cpu", "cpu", CpuConfig),
    ],
)
def test_an_engine_is_chosen_by_either_key(backend: str, group: str, expected: str, cls: type) -> None:
    made = job(backend=backend, backend_config__name=group)
    assert made.backend == expected and type(made.backend_config) is cls


MESSAGES = [
    (
        {"modle": 1},
        "modle: no such key; expected one of name, model, dataset,",
        "did you mean model?",
    ),
    ({"model__pth": "x"}, "model.pth: no such key; expected one of path, revision,", "did you mean path?"),
    ({"task__promt": "x"}, "task.promt: no such key; expected one of name, prompt, suffix; did you mean prompt?", ""),
    ({"sampling__max_token": 1}, "sampling.max_token: no such key; expected one of", "did you mean max_tokens?"),
    (
        {"model__dtype": "bf16"},
        "model.dtype: 'bf16'; expected one of auto, float32, float16, bfloat16; did you mean bfloat16?",
        "",
    ),
    ({"mode": "Plan"}, "mode: 'Plan'; expected one of run, plan, status, merge, verify; did you mean plan?", ""),
    ({"backend": "cda"}, "backend: 'cda'; expected one of auto, cuda, triton, cpu; did you mean cuda?", ""),
    ({"backend_config__name": "gpu"}, "backend_config.name: 'gpu'; expected one of auto, cuda, triton, cpu;", ""),
    ({"backend_config__block_size": 48}, "backend_config.block_size: 48; expected an integer, a power of two;", ""),
    ({"sampling__top_p": 1.5}, "sampling.top_p: 1.5; expected a number, more than 0 and at most 1; correct it", ""),
    ({"sampling__temperature": float("nan")}, "sampling.temperature: nan; expected a number, at least 0;", ""),
    ({"sampling__temperature": 10**400}, "sampling.temperature: 1000", "expected a number, at least 0;"),
    (
        {"output__row_group_rows": 2**63},
        "output.row_group_rows: 9223372036854775808",
        "an integer of 64 bits, at least 1;",
    ),
    ({"output__row_group_rows": 10**400}, "output.row_group_rows: 1000", "expected an integer of 64 bits, at least 1;"),
    (
        {"sampling__stop": "x"},
        "sampling.stop: 'x'; expected a list of texts; put it in brackets, as in sampling.stop=[x]",
        "",
    ),
    ({"sampling__max_tokens": "many"}, "sampling.max_tokens: 'many'; expected an integer, at least 1, or null;", ""),
    ({"sampling__max_tokens": True}, "sampling.max_tokens: true; expected an integer", ""),
    (
        {"backend_config": {"name": "cpu", "num_threads": 0}},
        "backend_config.num_threads: 0; expected an integer, at least 1,",
        "",
    ),
    ({"sampling__stop": ["a", ""]}, "sampling.stop: holds an empty text; expected texts that end an output;", ""),
    ({"dataset__path": ""}, "dataset.path: ''; expected a path; write . for the current folder", ""),
    ({"model__path": " "}, "model.path: ' '; expected a path; write . for the current folder", ""),
    ({"output__folder": ""}, "output.folder: ''; expected a path; write . for the current folder", ""),
    ({"retry_errors": "yes"}, "retry_errors: 'yes'; expected true or false; correct it", ""),
    ({"model__path": None}, "model.path: null; expected text; correct it", ""),
    ({"model__path": "???"}, "model.path: not set; expected text; set it, as in model.path=...", ""),
    ({"model": "llama"}, "model: 'llama'; expected keys with values; correct it", ""),
    ({"model": None}, "model: null; expected keys with values; correct it", ""),
    (
        {"task": {"name": "genrate"}},
        "task.name: 'genrate'; expected one of generate, embed; did you mean generate?",
        "",
    ),
    ({"task": {"prompt": "x"}}, "task.name: not set; expected one of generate, embed; set it, as in task.name=...", ""),
    ({"task": {"name": ["x"]}}, "task.name: ['x']; expected one of generate, embed; correct it", ""),
    ({"name": "a/b"}, "name: 'a/b'; expected a name for a folder, at most 200 bytes;", ""),
    ({"name": ".."}, "name: '..'; expected a name for a folder", ""),
    ({"name": None}, "name: null; expected text; correct it", ""),
    ({"model__revision": "${nothing}"}, "model.revision: Interpolation key 'nothing' not found; expected a value", ""),
    ({"model__revision": "${oc.env:NO_SUCH_VARIABLE}"}, "model.revision: ", "NO_SUCH_VARIABLE"),
    # combinations
    (
        {"backend": "cpu", "backend_config__name": "cuda"},
        "backend: cpu with backend_config=cuda; expected one engine;",
        "",
    ),
    (
        {"task": {"name": "embed"}, "sampling__n": 2},
        "sampling.n: 2 with task embed; expected 1, as only tasks that",
        "",
    ),
    ({"task": {"name": "embed"}, "sampling__columns": {"top_k": "k"}}, "sampling.columns: top_k with task embed;", ""),
    ({"sampling__n": 2}, "sampling.n: 2 with sampling.temperature=0; expected a temperature above 0,", ""),
    ({"sampling__columns": {"topk": "k"}}, "sampling.columns.topk: no such sampling parameter;", "did you mean top_k?"),
    (
        {"sampling__min_tokens": 9, "sampling__max_tokens": 8},
        "sampling.min_tokens: 9; expected at most sampling.max_tokens, which is 8;",
        "",
    ),
    ({"retry_errors": True, "mode": "plan"}, "retry_errors: true with mode=plan; expected mode=run;", ""),
    ({"shard__index": 4, "shard__count": 4}, "shard.index: 4; expected less than shard.count, which is 4", ""),
    (
        {"parallelism__tp": 2, "parallelism__ep": 4, "mode": "plan"},
        "parallelism.ep: 4; expected a divisor of tp * dp = 2 * 1 = 2, the devices that experts are spread over;",
        "",
    ),
    (
        {"parallelism__dp": 2, "parallelism__ep": 2, "parallelism__prefill": 1},
        "parallelism.prefill: 1 with ep=2: 2 / 1 = 2 copies share experts and compute each step together;",
        "",
    ),
    (
        {"output__compression_level": 30},
        "output.compression_level: 30 with compression zstd; expected 1 to 22, or null; correct it",
        "",
    ),
    (
        {"output__compression_level": 3, "output__compression": "snappy"},
        "output.compression_level: 3 with compression snappy; expected null; correct it",
        "",
    ),
    (
        {"model__adapter": "a"},
        "model.adapter: 'a'; expected one of model.adapters, which are none; correct the name",
        "",
    ),
    ({"model__adapter_column": "c"}, "model.adapter_column: 'c' without model.adapters; expected both or none", ""),
    ({"model__adapters": {"a": "x"}}, "model.adapters: a, and no row uses one; expected model.adapter or", ""),
]


@pytest.mark.parametrize(("changes", "beginning", "end"), MESSAGES, ids=[next(iter(case[0])) for case in MESSAGES])
def test_refused_in_one_line(changes: dict[str, Any], beginning: str, end: str) -> None:
    message = refused(**changes)
    assert message.startswith(beginning) and end in message and "\n" not in message


def test_all_findings_come_at_once() -> None:
    message = refused(modle=1, model__dtype="bf16", dataset__limit=-1, task={"name": "genrate", "promt": "x"})
    assert [line.split(":")[0] for line in message.splitlines()] == [
        "task.name",
        "modle",
        "model.dtype",
        "dataset.limit",
    ]


def test_missing_groups_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load(OmegaConf.create({"name": "x"}))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["model", "dataset", "task", "sampling", "backend_config"]


def test_saved_configuration_is_the_same_job_again() -> None:
    made = job(sampling__n=2, sampling__temperature=0.5, sampling__columns={"top_k": "k"}, backend="cpu", name="ü")
    saved = yaml.safe_load(to_yaml(made))
    assert load(OmegaConf.create(saved)) == made


SECRETS = [
    "https://user:pass@host/x",
    "s3://key:secret@bucket/x",
    "https://host/x?X-Amz-Signature=abcdef012345",
    "https://host/x?a=1&sig=abcdef012345",
    "hf_" + "a1B2" * 8,
    "sk-" + "abc123" * 6,
    "AKIA" + "A1B2" * 4,
    "ghp_" + "a1B2" * 9,
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_do_not_reach_the_saved_configuration(secret: str) -> None:
    hidden = secret.rpartition("://")[2].partition("@")[0].rpartition("=")[2]
    text = to_yaml(job(dataset__path=secret))
    assert hidden not in text and "***" in text


def test_values_of_secret_variables_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    text = to_yaml(job(model__revision="correct-horse-battery"))
    assert "correct-horse" not in text and "revision: '***'" in text
    assert mask("user@example.org wrote sk-ip and token=1", {}) == "user@example.org wrote sk-ip and token=1"


def test_paths_with_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_path("project:conf/config.yaml")).is_file()
    assert Path(resolve_path("package:runner/tasks"), "__init__.py").is_file()
    assert resolve_path("~/models") == str(Path.home() / "models")
    for plain in ("models/x", "/models/x", "s3://bucket/x", "org/name", "C:/x"):
        assert resolve_path(plain) == plain
    with pytest.raises(ConfigError, match=r"package:no_such_one/model: no Python package 'no_such_one' is installed"):
        resolve_path("package:no_such_one/model")
    with pytest.raises(ConfigError, match="no Python package"):
        resolve_path("package:os.path/x")


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explosive").mkdir()
    (tmp_path / "explosive" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_path("package:explosive/model") == str(tmp_path / "explosive" / "model")


def test_every_key_is_documented() -> None:
    undocumented = [
        f"{key.name}.{inner.name}"
        for key in config.job_keys("cpu")
        for inner in (schema.keys(key.hint) if key.is_group else [key])
        if not inner.doc and not (key.name == "task" and inner.name != "name")
    ]
    assert undocumented == []


def test_configuration_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    page = (FOLDER / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration(), "run python -m runner.docs"


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["???", "${x}", "${oc.env:HOME}", "auto", "cuda", "generate", "embed", "plan", 10**400, -1, 0, 1]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FULL = {**yaml.safe_load(yaml.safe_dump(BASE))}
PATHS = [
    *[(key.name,) for key in config.job_keys()],
    *[(key.name, inner.name) for key in config.job_keys("cpu") if key.is_group for inner in schema.keys(key.hint)],
    ("backend_config", "name"),
    ("sampling", "columns", "top_k"),
]


@example([(("\n",), "${0}")])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PATHS) | st.tuples(st.text(max_size=6)), JUNK), min_size=1, max_size=4))
def test_any_configuration_is_a_job_or_a_message(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    made = copy.deepcopy(FULL)
    for path, value in changes:
        node: Any = made
        for group in path[:-1]:
            if isinstance(node, dict):
                node = node.setdefault(group, {})
        if isinstance(node, dict):
            node[path[-1]] = value
    try:
        cfg = OmegaConf.create(made)
    except OmegaConfBaseException:  # not even a tree of OmegaConf's: Hydra says so before load is called
        return
    try:
        assert isinstance(load(cfg), JobConfig)
    except ConfigError as error:
        assert all(": " in line and "; expected " in line for line in str(error).split("\n"))
