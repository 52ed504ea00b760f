"""A look at the input before anything is computed: how much there is, and a sample of real rows through the task.

For mode=plan. Finds the mistakes that would otherwise cost a night: a column that is not there, a template that fails,
prompts that do not fit.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engines import costs
from engines.api import Request
from engines.checkpoint import Checkpoint
from engines.platform import measure
from runner.chunk import Chunk
from runner.errors import ConfigError, InputError, RowError
from runner.progress import duration
from runner.prompt import load_tokenizer
from runner.sink import unwritable
from runner.source import Source, open_source
from runner.source.paths import shown_url
from runner.tasks import Task, build_task

if TYPE_CHECKING:
    from runner.config import JobConfig
    from runner.plan import Plan

SAMPLE_ROWS = 256
SAMPLED_CHUNKS = 4
NUM_EXAMPLES = 2
NUM_BINS = 8
UNKNOWN_LENGTH = 1 << 20
"""Stands for the context of a model that does not say how long it is."""


@dataclass(frozen=True)
class RowProblem:
    """Sampled rows that cannot be processed for one reason."""

    code: str
    num_rows: int
    example: str
    """Message of the first one."""


@dataclass(frozen=True)
class Estimate:
    """Time of the whole job at the rates of a device: what the arithmetic needs at least, if it is kept busy."""

    device: str
    prefill_s: float
    decode_s: float
    """If every output is as long as max_tokens allows."""
    cost: float | None = None
    """In the currency of host.price_per_hour."""


@dataclass(frozen=True)
class Inspection:
    """What the input holds, and what it asks of the engine. Estimates go from the sampled rows to all rows."""

    num_files: int
    num_chunks: int
    num_rows: int
    """Rows of the files, before filter and limit."""
    expected_rows: int
    """Rows that pass filter and limit, as far as the sample tells."""
    sampled_rows: int
    prompt_lengths: tuple[int, ...] = ()
    """Tokens of each sampled prompt, one a row."""
    problems: tuple[RowProblem, ...] = ()
    examples: tuple[str, ...] = ()
    """The first prompts, as the model gets them."""
    prompt_tokens: int = 0
    """Of the whole job, estimated."""
    max_output_tokens: int = 0
    """Of the whole job, if every output is as long as it may be."""
    estimates: tuple[Estimate, ...] = ()

    @property
    def typical_tokens(self) -> float:
        """Mean length of a sequence halfway through its output."""
        if not self.prompt_lengths or not self.expected_rows:
            return 0.0
        mean = sum(self.prompt_lengths) / len(self.prompt_lengths)
        return mean + self.max_output_tokens / self.expected_rows / 2

    def text(self) -> str:
        rows = f"{self.num_rows:,} rows in {self.num_files:,} files, {self.num_chunks:,} chunks"
        if self.expected_rows != self.num_rows:
            rows += f"; about {self.expected_rows:,} after filter and limit"
        lines = [f"rows      {rows}"]
        if not self.sampled_rows:
            return "\n".join([*lines, "          there is nothing to do"])
        lines.append(f"sample    {self.sampled_rows:,} rows through template and tokenizer")
        for problem in self.problems:
            share = problem.num_rows / self.sampled_rows
            lines.append(f"          {problem.num_rows} rows ({share:.0%}) end as {problem.code}: {problem.example}")
        lines += ["", "prompt tokens", *(f"  {line}" for line in histogram(self.prompt_lengths))]
        lines.append(f"\ntokens    {self.prompt_tokens:,} in; up to {self.max_output_tokens:,} out")
        lines += [f"time      {_estimate(estimate)}" for estimate in self.estimates]
        for number, example in enumerate(self.examples, 1):
            lines += ["", f"prompt {number}", *(f"  | {line}" for line in example.splitlines() or [""])]
        return "\n".join(lines)


def inspect(plan: Plan, checkpoint: Checkpoint) -> Inspection:
    """What the job's input holds.

    Raises ConfigError for a column that is missing and for a task that fails on every sampled row, InputError for
    files that are missing or unreadable.
    """
    job = plan.job
    tokenizer = load_tokenizer(checkpoint.path)
    length = plan.settings.config.max_model_len or UNKNOWN_LENGTH
    task = build_task(job, checkpoint, tokenizer, length)
    source = open_source(job.dataset)
    check_columns(job, task, source)

    chunks = list(source.chunks())
    num_rows = sum(chunk.num_rows for chunk in chunks)
    prompts, errors, passed, read = _sample(source, task, chunks)
    if errors and not prompts:
        first = errors[0]
        raise ConfigError(
            f"task {job.task.name}: fails on all of {len(errors)} sampled rows, on the first one with "
            f"{first.code}: {first.message}; expected rows that become prompts; correct the task or the dataset"
        )
    expected = round(num_rows * passed / read) if read else num_rows
    if job.dataset.limit is not None:
        expected = min(expected, job.dataset.limit)
    by_code = Counter(error.code for error in errors)
    lengths = tuple(len(prompt.token_ids) for prompt in prompts)
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    share = len(prompts) / max(len(prompts) + len(errors), 1)
    good_rows = expected * share
    output = _mean_output(prompts, length)
    found = Inspection(
        num_files=len({chunk.file for chunk in chunks}),
        num_chunks=len(chunks),
        num_rows=num_rows,
        expected_rows=expected,
        sampled_rows=len(prompts) + len(errors),
        prompt_lengths=lengths,
        problems=tuple(
            RowProblem(code, count, next(error.message for error in errors if error.code == code))
            for code, count in by_code.most_common()
        ),
        examples=tuple(tokenizer.decode_whole(prompt.token_ids) for prompt in prompts[:NUM_EXAMPLES]),
        prompt_tokens=round(good_rows * job.samples * mean),
        max_output_tokens=round(good_rows * job.samples * output),
    )
    return replace(found, estimates=_estimates(plan, good_rows * job.samples, mean, output))


def check_columns(job: JobConfig, task: Task, source: Source) -> None:
    """Raises ConfigError naming every column that the configuration uses and the input has not or the output cannot
    hold, InputError where the input has none at all."""
    wanted = dict.fromkeys(task.columns, f"task {job.task.name}")
    wanted |= {column: f"sampling.columns.{key}" for key, column in job.sampling_columns.items()}
    wanted |= dict.fromkeys(job.output.keep_columns or [], "output.keep_columns")
    if job.model.adapter_column is not None:
        wanted[job.model.adapter_column] = "model.adapter_column"
    if job.dataset.id_column is not None:
        wanted[job.dataset.id_column] = "dataset.id_column"
    if wanted and not source.schema.names:
        raise InputError(
            f"dataset.path: {shown_url(job.dataset.path)}: empty, so without columns; expected {', '.join(wanted)}; "
            "check the input"
        )
    findings = []
    for column, key in wanted.items():
        if column not in source.schema.names:
            near = difflib.get_close_matches(column, source.schema.names, 1)
            hint = f"did you mean {near[0]!r}?" if near else "correct the name"
            columns = ", ".join(source.schema.names)
            findings.append(f"{key}: column {column!r} is not in the dataset; expected one of {columns}; {hint}")
    kept = source.schema.names if job.output.keep_columns is None else job.output.keep_columns
    for field in (source.schema.field(name) for name in kept if name in source.schema.names):
        if why := unwritable(field.type):
            findings.append(
                f"output.keep_columns: column {field.name!r} is {field.type}, which Parquet cannot hold ({why}); "
                "expected other columns; name those to keep"
            )
    if findings:
        raise ConfigError("\n".join(findings))


def _sample(source: Source, task: Task, chunks: Sequence[Chunk]) -> tuple[list[Request], list[RowError], int, int]:
    """(first request of each sampled row, errors of the others, rows that passed the filter, rows read)."""
    filled = [chunk for chunk in chunks if chunk.num_rows]
    step = max(len(filled) // SAMPLED_CHUNKS, 1)
    picked = filled[::step][:SAMPLED_CHUNKS]
    prompts: list[Request] = []
    errors: list[RowError] = []
    passed = read = 0
    for position, chunk in enumerate(picked):
        batch = source.read(chunk, task.columns)
        read += chunk.num_rows
        passed += batch.num_rows
        share = SAMPLE_ROWS // len(picked)
        first = 0 if position == 0 else max((batch.num_rows - share) // 2, 0)
        for row in task.requests(batch.slice(first, share), chunk.file, 0):
            if isinstance(row, RowError):
                errors.append(row)
            else:
                prompts.append(row[0])
    return prompts, errors, passed, read


def _mean_output(prompts: Sequence[Request], length: int) -> float:
    """Tokens that an output may have, the mean over the sampled rows."""
    longest = []
    for prompt in prompts:
        if prompt.kind != "generate" or prompt.sampling is None:
            return 0.0
        room = length - len(prompt.token_ids)
        longest.append(room if prompt.sampling.max_tokens is None else min(prompt.sampling.max_tokens, room))
    return sum(longest) / len(longest) if longest else 0.0


def _estimates(plan: Plan, num_requests: float, prompt_tokens: float, output_tokens: float) -> tuple[Estimate, ...]:
    spec, config = plan.spec, plan.settings.config
    if spec is None or not num_requests:
        return ()
    found = []
    host = measure(plan.host, plan.settings.dtype)
    for place, memory in enumerate(plan.memory):
        on_cpu = place == 0 and plan.settings.backend == "cpu"
        if on_cpu and host.device != "cpu":
            continue  # the processor of a described machine with an accelerator has no rates
        dtype = memory.dtype
        rate = host.flops_32bit if dtype == "float32" else host.flops_16bit
        if not rate or not host.bytes_s:
            continue
        devices = 1 if on_cpu else plan.job.parallelism.tp * plan.job.parallelism.dp
        together = min(config.max_num_seqs, memory.num_seqs(prompt_tokens + output_tokens) or config.max_num_seqs)
        step_tokens = config.max_num_batched_tokens
        prefill, decode = costs.job(spec, dtype, num_requests, prompt_tokens, output_tokens, together, step_tokens)
        times = [cost.time_s(host.bytes_s * devices, rate * devices) for cost in (prefill, decode)]
        price = None if host.price_per_hour is None else sum(times) / 3600 * host.price_per_hour
        found.append(Estimate(memory.device, times[0], times[1], price))
    return tuple(found)


def _estimate(estimate: Estimate) -> str:
    total = estimate.prefill_s + estimate.decode_s
    price = "" if estimate.cost is None else f", cost {estimate.cost:,.2f}"
    return (
        f"at least {duration(estimate.prefill_s)} for prompts, {duration(total)} with the longest outputs{price}, "
        f"at the full rates of {estimate.device}"
    )


def histogram(lengths: Sequence[int]) -> list[str]:
    """A few lines of text: ranges of equal width, counts, bars."""
    if not lengths:
        return ["(none)"]
    low, high = min(lengths), max(lengths)
    width = max(-(-(high - low + 1) // NUM_BINS), 1)
    counts = Counter((length - low) // width for length in lengths)
    most = max(counts.values())
    digits = len(str(high))
    return [
        f"{low + i * width:>{digits}} to {min(low + (i + 1) * width - 1, high):>{digits}}  {counts[i]:>5}  "
        + "#" * -(-counts[i] * 40 // most)
        for i in range((high - low) // width + 1)
    ]
