"""From rows to token ids: row templates, chat templates, the tokenizer. Templates run in a sandbox."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from runner.errors import ConfigError, InputError, RowError

MAX_PROMPT_CHARS = 10_000_000
"""A rendered prompt longer than this is an error of its row."""
ONE_COLUMN = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


class Template:
    """A Jinja template over the columns of a row. Undefined names and nulls that are printed are errors of the row."""

    def __init__(self, text: str, key: str) -> None:
        """key: where the template stands in the configuration, for messages. Raises ConfigError for bad syntax."""
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        try:
            self._template = environment.from_string(text)
            self.columns = sorted(meta.find_undeclared_variables(environment.parse(text)))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{key}: {error.message} in line {error.lineno}; expected a Jinja template; correct it"
            ) from None
        parts = ONE_COLUMN.split(text)
        # Only text and plain columns: no interpreter is needed.
        self._parts = parts if all("{{" not in p and "{%" not in p and "{#" not in p for p in parts[::2]) else None

    def render(self, batch: pa.RecordBatch) -> list[str | RowError]:
        """The text of each row."""
        values = {name: batch.column(name).to_pylist() for name in self.columns}
        if self._parts is not None and all(pa.types.is_string(batch.schema.field(n).type) for n in self.columns):
            return self._join(self._parts, values, batch.num_rows)
        return [self._render_row({name: column[i] for name, column in values.items()}) for i in range(batch.num_rows)]

    def _join(self, parts: list[str], values: Mapping[str, list[Any]], count: int) -> list[str | RowError]:
        columns = [[part] * count if i % 2 == 0 else values[part] for i, part in enumerate(parts)]
        rows: list[str | RowError] = []
        for row in zip(*columns, strict=True):
            try:
                rows.append("".join(row))
            except TypeError:
                rows.append(self._null(dict(zip(parts[1::2], row[1::2], strict=True))))
        return rows

    def _render_row(self, row: Mapping[str, Any]) -> str | RowError:
        if any(value is None for value in row.values()) and self._parts is not None:
            return self._null(row)
        try:
            text = "".join(_limited(self._template.generate(row)))
        except RowError as error:
            return error
        except Exception as error:  # a template may raise anything
            return RowError("template_error", f"template: {type(error).__name__}: {error}")
        return text

    def _null(self, row: Mapping[str, Any]) -> RowError:
        names = ", ".join(name for name, value in row.items() if value is None)
        return RowError(
            "null_input", f"{names}: null; expected a value; filter such rows, or give the template a default"
        )


def _limited(pieces: Iterable[str]) -> Iterable[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_PROMPT_CHARS:
            raise RowError("too_long", f"the rendered prompt has more than {MAX_PROMPT_CHARS:,} characters")
        yield piece


class Tokenizer:
    """The checkpoint's tokenizer and chat template. Text that spells a control token stays text."""

    def __init__(self, tokenizer: FastTokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.config = config
        self.chat_template = chat_template

    def encode(self, texts: list[str], add_special: bool = True) -> list[list[int]]:
        """Token ids of data: control tokens in it are spelled out, those of the post-processor are added."""
        self._tokenizer.encode_special_tokens = True
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special)]

    def encode_rendered(self, texts: list[str]) -> list[list[int]]:
        """Token ids of chat templates' output, in which control tokens are meant."""
        self._tokenizer.encode_special_tokens = False
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._tokenizer.decode_batch([list(i) for i in ids], skip_special_tokens=True)

    def control_tokens(self) -> list[str]:
        """Spellings of the tokenizer's special tokens."""
        return sorted((t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special), key=len)

    def chat(self, template: str | None = None) -> ChatTemplate:
        """Raises ConfigError when neither the task nor the checkpoint has a chat template."""
        text = template or self.chat_template
        if text is None:
            raise ConfigError(
                "task.template: null, and the checkpoint has no chat template; expected one of them; "
                "write task.template, or use task=generate"
            )
        return ChatTemplate(text, self)


class ChatTemplate:
    """Messages to text as transformers' apply_chat_template makes it."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template: {error.message} in line {error.lineno}; expected a Jinja template; correct it"
            ) from None
        self._tokens = {k: _content(v) for k, v in tokenizer.config.items() if k.endswith("_token") and v}
        spellings = [re.escape(t) for t in reversed(tokenizer.control_tokens())]
        self._control = re.compile("|".join(spellings)) if spellings else None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str | RowError:
        """The prompt for the next message. A control token spelled in a message's content is broken up, so that it
        stays text: a word joiner (U+2060) goes behind its first character."""
        try:
            safe = [{k: self._text(v) for k, v in message.items() if v is not None} for message in messages]
            pieces = self._template.generate(messages=safe, add_generation_prompt=True, **self._tokens)
            return "".join(_limited(pieces))
        except RowError as error:
            return error
        except Exception as error:  # a template may raise anything
            return RowError("template_error", f"chat template: {type(error).__name__}: {error}")

    def _text(self, value: Any) -> Any:
        if isinstance(value, str) and self._control is not None:
            return self._control.sub(lambda m: m[0][0] + "\u2060" + m[0][1:], value)
        return value


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a local checkpoint folder. Raises InputError when there is none that can be read."""
    folder = Path(path)
    config_file, chat_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(config_file.read_text("utf-8")) if config_file.exists() else {}
        if (folder / "tokenizer.json").exists():
            tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            # Older checkpoints have only the slow form; transformers converts it.
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True).backend_tokenizer
    except Exception as error:
        raise InputError(
            f"model.path: {path} has no tokenizer that can be read ({type(error).__name__}: {error}); "
            "expected tokenizer.json; take the tokenizer's files from where the weights came from"
        ) from error
    template = chat_file.read_text("utf-8") if chat_file.exists() else config.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return Tokenizer(tokenizer, config, template)
