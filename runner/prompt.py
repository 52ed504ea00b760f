"""From rows to token ids: row templates, chat templates, the tokenizer. Templates run in a sandbox (runner/sandbox.py).

Text from data never becomes a control token. A template may spell control tokens, data may not: `Tokenizer.shield` puts
private-use characters in place of the spellings that data has, and `Tokenizer.encode_rendered` encodes those as text.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from jinja2 import ext, meta, nodes, parser
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from engines.checkpoint import MAX_JSON_BYTES, inside
from runner.errors import (
    BAD_MESSAGES,
    NULL_INPUT,
    TEMPLATE_ERROR,
    TOO_LONG,
    UNREADABLE_ROW,
    ConfigError,
    InputError,
    RowError,
)
from runner.sandbox import Sandbox

MAX_PROMPT_CHARS = 10_000_000
"""A rendered prompt longer than this is an error of its row."""
SHIELD = "\U000f0000"
"""Announces a shielded spelling; the character after it says which one. Private use: real text has no such character,
and where it does, it is shielded too."""
ONE_COLUMN = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


class Template:
    """A Jinja template over the columns of a row; `row["any name"]` reaches columns whose names are no Jinja names.

    Undefined names and nulls that are printed are errors of the row; a null may be tested for.
    """

    def __init__(self, text: str, key: str) -> None:
        """key: where the template stands in the configuration, for messages. Raises ConfigError for bad syntax."""
        self._environment = Sandbox(_printable, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        self._key = key
        self._template, tree = _compiled(self._environment, text, key)
        self.columns = _columns(tree, key)
        parts = ONE_COLUMN.split(text)
        # Only text and plain columns: no interpreter is needed.
        simple = all("{{" not in p and "{%" not in p and "{#" not in p for p in parts[::2])
        self._parts = parts if simple and {*parts[1::2]} == {*self.columns} else None

    def render(self, batch: pa.RecordBatch, shield: Callable[[Any], Any] | None = None) -> list[str | RowError]:
        """The text of each row. shield: is applied to every value first."""
        columns = [values_of(batch.column(name), name) for name in self.columns]
        if shield is not None:
            columns = [[shield(value) for value in column] for column in columns]
        if self._parts is not None and all(_is_text(batch.schema.field(n).type) for n in self.columns):
            return self._join(self._parts, dict(zip(self.columns, columns, strict=True)), batch.num_rows)
        if not columns:
            return [self._render_row({})] * batch.num_rows
        return [self._render_row(dict(zip(self.columns, row, strict=True))) for row in zip(*columns, strict=True)]

    def _join(self, parts: list[str], values: Mapping[str, list[Any]], count: int) -> list[str | RowError]:
        columns = [[part] * count if i % 2 == 0 else values[part] for i, part in enumerate(parts)]
        rows: list[str | RowError] = []
        for row in zip(*columns, strict=True):
            try:
                text = "".join(row)
            except TypeError:
                rows.append(self._null(dict(zip(parts[1::2], row[1::2], strict=True))))
                continue
            rows.append(text if len(text) <= MAX_PROMPT_CHARS else _oversized(self._key))
        return rows

    def _render_row(self, row: Mapping[str, Any]) -> str | RowError:
        for value in row.values():
            if isinstance(value, RowError):
                return value
        self._environment.start()
        try:
            return "".join(_limited(self._template.generate(row, row=row), self._key))
        except RowError as error:
            return error
        except _NullPrinted:
            return self._null(row)
        except Exception as error:  # a template may raise anything
            return _failed(self._key, error)

    def _null(self, row: Mapping[str, Any]) -> RowError:
        names = ", ".join(name for name, value in row.items() if value is None) or "a value"
        return RowError(
            NULL_INPUT,
            f"{self._key}: {names}: null; expected a value; filter such rows, or give the template a default",
        )


def values_of(column: pa.Array, name: str) -> list[Any]:
    """A column as Python has it; a RowError for each value that Python cannot hold, as a date in the year 5,000,000."""
    try:
        return column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        return [_value(scalar, name) for scalar in column]


def _value(scalar: pa.Scalar, name: str) -> Any:
    try:
        return scalar.as_py()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        return RowError(
            UNREADABLE_ROW,
            f"column {name}: {scalar.type} of no Python value ({said}); expected one within the ranges of Python's "
            "datetime; correct it, or filter such rows",
        )


def _compiled(environment: Sandbox, text: str, key: str) -> tuple[jinja2.Template, nodes.Template]:
    try:
        return environment.compiled(text, key)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}; expected a Jinja template; correct it") from None


class _NullPrinted(Exception):
    """A template prints a null."""


def _printable(value: Any) -> Any:
    if value is None:
        raise _NullPrinted
    return value


def _columns(tree: nodes.Template, key: str) -> list[str]:
    """Columns that a template reads, by name or as row["name"]."""
    tracking = meta.TrackingCodeGenerator(tree.environment)  # type: ignore[arg-type]
    tracking.optimizer = None  # nothing of the template is computed before it is rendered
    tracking.visit(tree)
    names = tracking.undeclared_identifiers
    if "row" not in names:
        return sorted(names)
    uses = sum(node.name == "row" and node.ctx == "load" for node in tree.find_all(nodes.Name))
    found = []
    lookups: list[Any] = [*tree.find_all(nodes.Getitem), *tree.find_all(nodes.Getattr)]
    for node in lookups:
        if isinstance(node.node, nodes.Name) and node.node.name == "row":
            column = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
            found += [column] if isinstance(column, str) else []
    if len(found) != uses:
        raise ConfigError(
            f'{key}: row without the name of a column; expected row["name"], so that the columns are known; '
            'write row["row"] for a column called row'
        )
    return sorted({*names} - {"row"} | {*found})


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _limited(pieces: Iterable[str], key: str) -> Iterable[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_PROMPT_CHARS:
            raise _oversized(key)
        yield piece


def _oversized(key: str) -> RowError:
    return RowError(
        TOO_LONG,
        f"{key}: the rendered text is longer than {MAX_PROMPT_CHARS:,} characters; expected less; filter such rows",
    )


def _failed(key: str, error: Exception) -> RowError:
    said = (str(error).splitlines() or [""])[0][:200]
    return RowError(
        TEMPLATE_ERROR,
        f"{key}: {type(error).__name__}: {said}; expected a template that holds for every row; correct it, or filter "
        "such rows",
    )


class Tokenizer:
    """The checkpoint's tokenizer and chat template. Text that spells a control token stays text.

    Control tokens are those that the tokenizer marks as special.
    """

    def __init__(self, tokenizer: FastTokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        """config: tokenizer_config.json. The tokenizer is taken over: truncation and padding are switched off."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.config = config
        self.chat_template = chat_template

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end-of-sequence token. What ends an output is the checkpoint's to say."""
        found = self._tokenizer.token_to_id(_content(self.config.get("eos_token")) or "")
        return () if found is None else (found,)

    @functools.cached_property
    def around(self) -> tuple[int, int]:
        """How many tokens the post-processor puts before and behind a text."""
        mask = self._tokenizer.encode("a", add_special_tokens=True).special_tokens_mask
        text = [i for i, special in enumerate(mask) if not special]
        return (text[0], len(mask) - 1 - text[-1]) if text else (len(mask), 0)

    def encode(self, texts: list[str], add_special: bool = True) -> list[list[int]]:
        """Token ids of data: control tokens in it are spelled out, those of the post-processor are added."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special)]

    def encode_rendered(self, texts: list[str], add_special: bool = False) -> list[list[int]]:
        """Token ids of templates' output, in which control tokens are meant; shielded ones in it are text."""
        encodings = self._meant.encode_batch_fast(texts, add_special_tokens=add_special)
        return [
            self._encode_shielded(text, add_special) if SHIELD in text else encoding.ids
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an output: of tokens that follow others."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        lead, text = self._lead
        whole = self._tokenizer.decode_batch([[*lead, *i] for i in ids], skip_special_tokens=True)
        return [found[len(text) :] for found in whole] if text else whole

    def decode_whole(self, ids: Sequence[int]) -> str:
        """The text of tokens that stand at the beginning."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def _lead(self) -> tuple[list[int], str]:
        """Tokens to put before an output, and their text, where decoding takes the space away that begins a text.

        SentencePiece's decoders do: what follows a prompt would be glued to it.
        """
        encode, decode = self._tokenizer.encode, self._tokenizer.decode
        apart, alone = encode("a a", add_special_tokens=False).ids, encode("a", add_special_tokens=False).ids
        if apart[: len(alone)] != alone or len(apart) == len(alone):
            return [], ""
        marked = (self._tokenizer.id_to_token(apart[len(alone)]) or "").startswith("\u2581")
        return (alone, decode(alone)) if marked and not decode(apart[len(alone) :]).startswith(" ") else ([], "")

    def spells_control(self, text: str) -> bool:
        """Whether a control token is spelled in the text."""
        return self._spelling.search(text) is not None

    def shield(self, value: Any) -> Any:
        """A value from data, with control tokens that its texts spell made unrecognizable at any depth."""
        if isinstance(value, str):
            shielded = self._spelling.sub(lambda match: self._codes[match[0]], value)
            return shielded + self._break if self._begins_control(shielded) else shielded
        if isinstance(value, list):
            return [self.shield(item) for item in value]
        if isinstance(value, dict):
            return {self.shield(name): self.shield(item) for name, item in value.items()}
        if isinstance(value, bytes) and self.spells_control(str(value)):
            return self.shield(str(value))
        return value

    def _begins_control(self, text: str) -> bool:
        """Whether a text ends as a control token begins, so that what comes behind it could complete the spelling."""
        beginnings, longest = self._beginnings
        tail = text.rstrip()[-longest:] if longest else ""
        return any(tail[start:] in beginnings for start in range(len(tail)))

    def chat(self, template: str | None = None, date: datetime.date | None = None) -> ChatTemplate:
        """Raises ConfigError when neither the task nor the checkpoint has a chat template."""
        text = template or self.chat_template
        if text is None:
            raise ConfigError(
                "task.template: null, and the checkpoint has no chat template; expected one of them; "
                "write task.template, or use task=generate"
            )
        return ChatTemplate(text, self, date)

    @functools.cached_property
    def _codes(self) -> dict[str, str]:
        """Spelling -> what stands for it in shielded text."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        spellings = [SHIELD, *sorted({token.content for token in added if token.special} - {""})]
        return {text: SHIELD + chr(ord(SHIELD) + 1 + i) for i, text in enumerate(spellings)}

    @functools.cached_property
    def _break(self) -> str:
        """Code that stands for nothing: what is before it and what is behind are encoded apart."""
        return SHIELD + chr(ord(SHIELD) + 1 + len(self._codes))

    @functools.cached_property
    def _beginnings(self) -> tuple[frozenset[str], int]:
        """Texts that a control token begins with, the longest one's length."""
        found = frozenset(text[:end] for text in self._codes if text != SHIELD for end in range(1, len(text)))
        return found, max(map(len, found), default=0)

    @functools.cached_property
    def _spelling(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in sorted(self._codes, key=len, reverse=True)))

    @functools.cached_property
    def _meant(self) -> FastTokenizer:
        """A copy that recognizes control tokens: the switch belongs to the tokenizer, not to a call."""
        copy = FastTokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy

    def _encode_shielded(self, text: str, add_special: bool) -> list[int]:
        spelled = {self._break: "", **{code: text for text, code in self._codes.items()}}
        pieces = []
        for piece in re.split(f"({'|'.join(map(re.escape, spelled))})", text):
            if piece in spelled:
                pieces.append(self._tokenizer.encode(spelled[piece], add_special_tokens=False))
            elif piece:
                pieces.append(self._meant.encode(piece, add_special_tokens=False))
        return list(self._meant.post_process(Encoding.merge(pieces, True), None, add_special).ids)


class ChatTemplate:
    """Messages to text as transformers' apply_chat_template makes it."""

    def __init__(self, text: str, tokenizer: Tokenizer, date: datetime.date | None = None) -> None:
        """date: what strftime_now tells; None: the template is not offered it.

        Raises ConfigError for bad syntax, and for a template that cannot do without a date.
        """
        self._environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        self._environment.globals["raise_exception"] = _refuse
        self._template, tree = _compiled(self._environment, text, "chat template")
        if date is not None:
            self._environment.globals["strftime_now"] = datetime.datetime.combine(date, datetime.time()).strftime
        elif _needs_date(tree):
            raise ConfigError(
                "task.date: null, and the chat template prints today's date; expected the date that it is to print, so "
                "that the job gives the same on any day; set task.date, as in task.date='2026-01-31'"
            )
        named = {name: _content(token) for name, token in tokenizer.config.items() if name.endswith("_token")}
        self._tokens = {name: token for name, token in named.items() if isinstance(token, str)}
        self._shield = tokenizer.shield

    def render(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str | RowError:
        """The prompt for the next message, for `encode_rendered`: control tokens that messages spell are shielded.

        variables: more of what the template reads.
        """
        known = {"tools": None, "documents": None, "add_generation_prompt": True, **self._tokens, **variables}
        self._environment.start()
        try:
            safe = [self._shield(dict(message)) for message in messages]
            return "".join(_limited(self._template.generate(known, messages=safe), "chat template"))
        except RowError as error:
            return error
        except _Refused as error:
            said = f"the chat template says {str(error)!r}"
            return RowError(BAD_MESSAGES, f"messages: {said}; expected what it takes; correct the row")
        except Exception as error:  # a template may raise anything
            return _failed("chat template", error)


class _Refused(Exception):
    """A chat template's raise_exception."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _needs_date(tree: nodes.Template) -> bool:
    """Whether a template calls strftime_now without asking first whether there is such a thing."""
    asked = [test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)]
    called = [call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
    return "strftime_now" in called and "strftime_now" not in asked


class _Generation(ext.Extension):
    """The block `generation`, by which templates mark the model's own words for training: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a local checkpoint folder. Raises InputError when there is none that can be read."""
    folder = Path(path)
    try:
        config = json.loads(_text(folder, "tokenizer_config.json") or "{}")
        if not isinstance(config, dict):
            raise ValueError(f"tokenizer_config.json holds a {type(config).__name__}")
        described = _text(folder, "tokenizer.json")
        tokenizer = _converted(path) if described is None else FastTokenizer.from_str(described)
        tokenizer.decode(tokenizer.encode("a").ids)
        template = _text(folder, "chat_template.jinja") or _named(config.get("chat_template"))
        if not isinstance(template, str | None):
            raise ValueError(f"the chat template is a {type(template).__name__}")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in the tokenizers library is no Exception
        reason = " ".join(str(error).split())
        raise InputError(
            f"model.path: {path} has no tokenizer that can be read ({type(error).__name__}: {reason}); "
            "expected tokenizer.json; take the tokenizer's files from where the weights came from"
        ) from error
    return Tokenizer(tokenizer, config, template)


def _converted(path: str) -> FastTokenizer:
    """For older checkpoints that have only the slow form: transformers converts it, with its own code alone."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(path, use_fast=True, local_files_only=True, trust_remote_code=False)
    return found.backend_tokenizer


def _text(folder: Path, name: str) -> str | None:
    """What is in a file of the checkpoint; None when there is no such file."""
    file = inside(folder, name)
    if not file.is_file():
        return None
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{name} is {file.stat().st_size:,} bytes; expected at most {MAX_JSON_BYTES:,}")
    return file.read_text("utf-8")


def _named(template: Any) -> Any:
    """The one called default, where a checkpoint has several chat templates."""
    if not isinstance(template, list):
        return template
    return next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
