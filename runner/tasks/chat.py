"""A reply to messages, through the model's own chat template."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from engines.api import Kind
from engines.checkpoint import Checkpoint
from runner.config import JobConfig, TaskConfig
from runner.errors import BAD_MESSAGES, NULL_INPUT, ConfigError, RowError
from runner.prompt import Template, Tokenizer, values_of
from runner.tasks._common import Limit, Prompt, encoded
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
    """Jinja template over the columns of a row, for the user's message; not used when `messages` is set."""
    template: str | None = None
    """Chat template to use instead of the checkpoint's."""
    date: str | None = None
    """The date that the chat template's strftime_now tells, as 2026-01-31: a job gives the same on any day. null: the
    template is not offered one, as most have a date of their own then; a template that insists on one is refused."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """More variables of the chat template, as in {enable_thinking: false}."""


def build(job: JobConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, max_model_len: int) -> Generate:
    config = job.task
    assert isinstance(config, Config)
    chat = tokenizer.chat(config.template, _date(config.date))
    parts = [
        (role, Template(text, f"task.{role}"))
        for role, text in (("system", config.system), ("user", config.user))
        if text is not None and config.messages is None
    ]
    if config.messages is None and config.user is None:
        raise ConfigError("task.user: null, and task.messages too; expected one of them; say where the message is")
    if config.messages is not None and config.system is not None:
        raise ConfigError(
            "task.system: set together with task.messages; expected one of them; put the system message first in the "
            "messages, or remove task.messages"
        )
    if "messages" in config.template_kwargs:
        raise ConfigError("task.template_kwargs.messages: the rows' own; expected other variables; remove it")
    columns = [config.messages] if config.messages else [c for _, template in parts for c in template.columns]

    def conversations(batch: pa.RecordBatch) -> list[list[dict[str, Any]] | RowError]:
        if config.messages:
            values = values_of(batch.column(config.messages), config.messages)
            return [_checked(value, config.messages) for value in values]
        texts = [(role, template.render(batch)) for role, template in parts]
        return [_conversation([(role, column[i]) for role, column in texts]) for i in range(batch.num_rows)]

    def rendered(messages: list[dict[str, Any]] | RowError) -> str | RowError:
        return messages if isinstance(messages, RowError) else chat.render(messages, **config.template_kwargs)

    def prompts(batch: pa.RecordBatch) -> list[Prompt]:
        return encoded([rendered(messages) for messages in conversations(batch)], batch, tokenizer.encode_rendered)

    limit = Limit(max_model_len - 1, "messages")
    return Generate(job, tokenizer, limit, columns, prompts)


def _date(text: str | None) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"task.date: {text!r}; expected a date, as 2026-01-31; correct it") from None


def _conversation(texts: list[tuple[str, str | RowError]]) -> list[dict[str, str]] | RowError:
    for _, text in texts:
        if isinstance(text, RowError):
            return text
    return [{"role": role, "content": str(text)} for role, text in texts]


def _checked(value: Any, column: str) -> list[dict[str, Any]] | RowError:
    if value is None:
        return RowError(NULL_INPUT, f"{column}: null; expected a list of messages; filter such rows")
    if isinstance(value, RowError):
        return value
    try:
        messages = json.loads(value) if isinstance(value, str) else value
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{str(value)[:60]!r} is no list of messages")
        return [_message(message) for message in messages]
    except (ValueError, RecursionError) as error:
        return RowError(BAD_MESSAGES, f"{column}: {error}; expected a list of {{role, content}}; correct the row")


def _message(value: Any) -> dict[str, Any]:
    """A message as chat templates take it: without keys that are null, which a table gives to every message."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ValueError(f"{str(value)[:60]} has no role")
    message = {name: item for name, item in value.items() if item is not None}
    if "content" not in message and "tool_calls" in message:
        return {**message, "content": None}
    if not isinstance(message.get("content"), (str, list)):
        raise ValueError(f"{str(value)[:60]} has no content that is text")
    return message
