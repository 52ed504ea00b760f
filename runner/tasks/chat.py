"""A reply to messages, through the model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engines.api import Kind
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.errors import ConfigError, RowError
from runner.prompt import Template, Tokenizer
from runner.tasks._common import Prompt, unreadable
from runner.tasks.generate import Generate

KIND: Kind = "generate"


@dataclass(frozen=True)
class Config(TaskConfig):
    """A reply to messages, through the model's own chat template."""

    messages: str | None = None
    """Column with a conversation: a list of {role, content}; null: one is made of `system` and `user`."""
    system: str | None = None
    """Jinja template over the columns of a row, for the system message; null: none."""
    user: str | None = None
    """Jinja template over the columns of a row, for the user's message."""
    template: str | None = None
    """Chat template to use instead of the checkpoint's."""
    on_too_long: str = field(default="error", metadata={"choices": ("error", "truncate_left", "truncate_right")})
    """A prompt longer than the context: an error of its row, or cut on that side, with input_truncated set."""


def build(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Generate:
    config = job.task
    assert isinstance(config, Config)
    chat = tokenizer.chat(config.template)
    parts = [
        (role, Template(text, f"task.{role}"))
        for role, text in (("system", config.system), ("user", config.user))
        if text is not None and config.messages is None
    ]
    if config.messages is None and config.user is None:
        raise ConfigError("task.user: null, and task.messages too; expected one of them; say where the message is")
    columns = [config.messages] if config.messages else [c for _, template in parts for c in template.columns]

    def conversations(batch: pa.RecordBatch) -> list[Any]:
        if config.messages:
            return [_checked(value, config.messages) for value in batch.column(config.messages).to_pylist()]
        texts = [(role, template.render(batch)) for role, template in parts]
        return [_conversation([(role, column[i]) for role, column in texts]) for i in range(batch.num_rows)]

    def prompts(batch: pa.RecordBatch) -> list[Prompt]:
        found: list[Prompt | str] = []
        for messages, why in zip(conversations(batch), unreadable(batch), strict=True):
            if why is not None:
                found.append(RowError("unreadable_row", why))
            else:
                found.append(messages if isinstance(messages, RowError) else chat.render(messages))
        ids = iter(tokenizer.encode_rendered([text for text in found if isinstance(text, str)]))
        return [next(ids) if isinstance(text, str) else text for text in found]

    return Generate(job, tokenizer, max_model_len - 1, columns, prompts, config.on_too_long)


def _conversation(texts: list[tuple[str, str | RowError]]) -> list[dict[str, str]] | RowError:
    for _, text in texts:
        if isinstance(text, RowError):
            return text
    return [{"role": role, "content": str(text)} for role, text in texts]


def _checked(value: Any, column: str) -> list[dict[str, Any]] | RowError:
    if value is None:
        return RowError("null_input", f"{column}: null; expected a list of messages; filter such rows")
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return RowError("bad_messages", f"{column}: expected a list of {{role, content}}; correct the row")
    return value
