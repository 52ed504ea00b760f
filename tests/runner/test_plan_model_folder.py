"""From model.path to a folder: local ones, hub ids, and what is said when neither works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from runner.config import ModelConfig
from runner.errors import InputError
from runner.hub import model_folder


def respond(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    """Replace the hub by an answer or an error; returns the calls that are made."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **arguments: Any) -> str:
        calls.append({"repository": repository, **arguments})
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "https://huggingface.co says no")
    return error


def test_a_local_folder_is_itself(weird_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = respond(monkeypatch, RuntimeError("not to be called"))
    assert model_folder(ModelConfig(str(weird_tmp_path))) == str(weird_tmp_path)
    assert calls == []


def test_a_hub_id_is_fetched_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = respond(monkeypatch, "/cache/x")
    assert model_folder(ModelConfig("org/model-1.5", revision="v2")) == "/cache/x"
    assert calls[0]["repository"] == "org/model-1.5" and calls[0]["revision"] == "v2"
    patterns = calls[0]["allow_patterns"]
    assert "*.safetensors" in patterns and "*.json" in patterns and "*.jinja" in patterns
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) and "Pooling" not in pattern for pattern in patterns)
    model_folder(ModelConfig("org/model"), weights=False)
    assert "*.safetensors" not in calls[1]["allow_patterns"]
    model_folder(ModelConfig("org/model", trust_remote_code=True))
    assert "*.py" in calls[2]["allow_patterns"]


def test_a_local_folder_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    respond(monkeypatch, RuntimeError("not to be called"))
    assert Path(model_folder(ModelConfig("org/model"))).resolve() == tmp_path / "org" / "model"


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./models/x", "nothing-here", "a/b/c", "../x/y", "org/model name", "~/models/x"]
)
def test_what_is_neither_a_folder_nor_an_id_asks_no_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = respond(monkeypatch, RuntimeError("not to be called"))
    with pytest.raises(InputError, match=r"model\.path: .* does not exist.*; expected a folder .*; check the spelling"):
        model_folder(ModelConfig(path))
    assert calls == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.RepositoryNotFoundError), "is neither a folder here nor a model on the hub; .*HF_TOKEN"),
        (http_error(errors.GatedRepoError), "access is gated; .* accept its terms on the hub and set HF_TOKEN"),
        (http_error(errors.RevisionNotFoundError), "has no revision 'v9'; .* correct model.revision"),
        (http_error(errors.LocalEntryNotFoundError), "the hub cannot be reached .LocalEntryNotFoundError."),
        (ConnectionError("no route"), "the hub cannot be reached .ConnectionError.; .* download it on a machine with"),
    ],
)
def test_what_the_hub_can_answer(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    respond(monkeypatch, error)
    with pytest.raises(InputError, match=message):
        model_folder(ModelConfig("org/model", revision="v9"))
