"""The text of `--help`, from the dataclasses of the configuration and the options that lie in conf."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from runner import config, schema
from runner.errors import ConfigError
from runner.schema import Key

WIDTH = 110
FLOW = ("model", "backend_config", "parallelism", "dataset", "task", "sampling", "output", "host", "shard")
"""Groups in the order of the flow; shard is no folder of options but keys of every job."""
USAGE = """\
python -m runner [group=option ...] [key=value ...]      run a job, or go on with it
python -m runner -m group=a,b key=1,2                    a sweep: one job for each combination
python -m runner mode=plan ...                           what would run, why, does it fit, how long
python -m runner mode=status ...                         how far it is, whoever works on it (mode=merge: mark it done)
python -m runner mode=verify ...                         check what is in the output folder
python -m runner --help <group>                          the keys of a group (also: --help job, --help all)
python -m runner --cfg job                               the composed configuration
python -m runner --config-dir <folder> ...               with YAML files of your own, in the same folders as conf
python -m runner.env                                     versions, devices, engines and why not"""
EXIT_CODES = """\
0 done   2 configuration   3 input or model files   4 output folder   5 no engine can run it   6 too many errors
70 defect of the runner   75 stopped with rows left: run the same command again"""


def overview(options: Mapping[str, Sequence[str]]) -> str:
    """The groups with one line on each, and the keys of every job with one line on each."""
    groups = [*FLOW, *(name for name in options if name not in FLOW)]
    summaries = {key.name: schema.summary(key.hint) for key in config.job_keys() if key.is_group}
    lines = ["A declarative batch inference job runner.", "", USAGE, "", "Groups, in the order of the flow:"]
    for name in groups:
        lines.append(f"  {name:<16}{summaries.get(name, 'your own')}")
        if options.get(name):
            lines += textwrap.wrap(", ".join(options[name]), WIDTH, initial_indent=" " * 18, subsequent_indent=" " * 18)
    lines += ["", "Keys of every job:", *_lines(_job_level()), "", "Exit codes:", textwrap.indent(EXIT_CODES, "  ")]
    return "\n".join(lines)


def group_help(name: str, options: Mapping[str, Sequence[str]]) -> str:
    """The keys of one group, of the job (`job`), or of all.

    Raises ConfigError for another name.
    """
    sections = dict(group_keys())
    if name == "all":
        return "\n\n".join(group_help(group, options) for group in ("job", *FLOW))
    if name != "job" and name not in FLOW:
        raise ConfigError(
            f"--help: no group {name!r}; expected one of job, all, {', '.join(FLOW)}; "
            + schema.advice(name, FLOW, "choose one")
        )
    found = [section for section in sections if section.split(" ")[0] == name]
    lines = []
    for section in found:
        title, keys = sections[section]
        lines += [f"{section}: {title}"]
        if section == name and options.get(name):
            lines += textwrap.wrap(
                f"Options: {', '.join(options[name])}", WIDTH, initial_indent="  ", subsequent_indent=" " * 11
            )
        lines += [*_lines(keys, "" if name == "job" else f"{name}."), ""]
    return "\n".join(lines).rstrip()


def group_keys() -> list[tuple[str, tuple[str, list[Key]]]]:
    """(section, (one line on it, its keys)) in the order of the flow. Engines and tasks with keys of their own have a
    section each, as "task embed"."""
    groups = {key.name: key.hint for key in config.job_keys() if key.is_group}
    sections: list[tuple[str, tuple[str, list[Key]]]] = [("job", ("Keys of every job", _job_level()))]
    for name in FLOW:
        keys = list(schema.keys(groups[name]))
        if name == "backend_config":
            keys.insert(0, config.ENGINE_NAME)
        sections.append((name, (schema.summary(groups[name]), keys)))
        own = {}
        if name == "backend_config":
            own = {backend: config.backend_class(backend) for backend in ("cuda", "triton", "cpu")}
        if name == "task":
            own = {task: module.Config for task, module in config.task_modules().items()}
        shared = {key.name for key in keys}
        for option, cls in own.items():
            more = [key for key in schema.keys(cls) if key.name not in shared]
            if more or name == "task":
                sections.append((f"{name} {option}", (schema.summary(cls), more)))
    return sections


def _job_level() -> list[Key]:
    return [key for key in config.job_keys() if not key.is_group]


def _lines(keys: Sequence[Key], prefix: str = "") -> list[str]:
    lines = []
    for key in keys:
        default = schema.default_words(key)
        kind = schema.expected_words(key) + (f"; default {default}" if default else "")
        lines.append(f"  {prefix}{key.name}: {kind}")
        lines += textwrap.wrap(key.doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines
