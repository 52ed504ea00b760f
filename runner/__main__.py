"""`python -m runner`: the command line. Hydra composes the configuration; every error is one message and an exit code.

Decides nothing about jobs: configuration goes to config.load, then to plan and job. Imports no torch.

Hydra's own entry point (hydra.main) prints its errors itself, exits with 1 and drops what the jobs of a sweep return;
so its parts are driven here: parser, composition, launcher and sweeper plug-ins are Hydra's.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from engines.threads import limit_spinning
from runner import config, schema
from runner.config import JobConfig
from runner.errors import ConfigError, Interrupted, RunnerError
from runner.naming import job_name
from runner.secrets import mask
from runner.storage import join, local_folder

CONFIG_NAME = "config"
INTERNAL_ERROR = 70


def main() -> None:
    """The console script and `python -m runner`. Exits with 0 or a code of runner/errors.py."""
    limit_spinning()
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(command_line(sys.argv[1:]))


def _leave(number: int, frame: FrameType | None) -> None:
    """SIGTERM where no job heeds it (runner/stop.py): before the folder is claimed, or a second one on the way out."""
    os.write(2, f"stopped by {signal.Signals(number).name}; run the same command again to go on\n".encode())
    os._exit(Interrupted.exit_code)


def command_line(argv: Sequence[str]) -> int:
    """What main does, with the exit code as its result."""
    if "--version" in argv:
        from runner.env import installed

        _print(f"batch-inference-runner {installed('batch-inference-runner')}")
        return 0
    parser = get_args_parser()
    parser.prog = "python -m runner"
    args = parser.parse_intermixed_args(argv)
    try:
        _check_flags(args)
        with _hydra(args) as hydra:
            return _dispatch(hydra, args)
    except RunnerError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return Interrupted.exit_code
    except Exception as error:
        return _internal_error(error, None)


def run_one(cfg: DictConfig) -> int:
    """One job, of a sweep or alone: the function that Hydra's launchers call. Its result is the exit code."""
    hydra, folder = HydraConfig.get(), None
    sweep = hydra.mode == RunMode.MULTIRUN
    try:
        with open_dict(cfg):
            cfg.name = job_name(cfg.get("name"), hydra.runtime.choices, hydra.overrides.task, sweep)
        if sweep:
            _mask_record(hydra.sweep.dir)
            _say(f"--- job {hydra.job.num}: {cfg.name}")
        job = config.load(cfg)
        folder = local_folder(join(job.output.folder, job.name))
        return _run(job)
    except RunnerError as error:
        _say(str(error))
        if isinstance(error, Interrupted) and error.signal is not None and sweep:
            if "BasicLauncher" in hydra.launcher._target_:
                raise KeyboardInterrupt from None  # whoever stops a sweep in this process does not want its next job
            _hand_on(error.signal)
        return error.exit_code
    except Exception as error:
        return _internal_error(error, folder)


def _hand_on(number: int) -> None:
    """Give a signal ahead of the time limit to the launcher that runs this job, now that finished rows are safe:
    submitit's handler puts the job in the queue again and ends the process."""
    from runner.stop import AHEAD

    handler = signal.getsignal(number)
    if number in AHEAD and callable(handler):
        try:
            handler(number, None)
        except RuntimeError as error:  # it was at its time limit too often
            _say(f"hydra/launcher: {_one_line(error)}; run the same command again to go on")


def _run(job: JobConfig) -> int:
    if job.mode == "verify":
        from runner.source import open_source
        from runner.verify import verify

        report = verify(join(job.output.folder, job.name), open_source(job.dataset))
        _print(mask(report.text()))
        return report.exit_code
    if job.mode in ("status", "merge"):
        from runner.status import merge, status

        output = join(job.output.folder, job.name)
        if job.mode == "merge":
            _print(mask(merge(output, job).text()))
            return 0
        found = status(output, job)
        _print(mask(found.text()))
        return found.exit_code
    from runner.parallel import own_rank
    from runner.plan import make_plan

    rank = own_rank(job)
    plan = make_plan(job)
    if job.mode == "plan":
        _print(mask(plan.text()))
        return 0
    if rank > 0:
        from engines.parallel.launch import follow_world

        follow_world(plan.settings)
        return 0
    from runner.job import run

    run(plan)
    return 0


def _check_flags(args: Namespace) -> None:
    flags = {"--run": args.run, "--multirun": args.multirun, "--cfg": args.cfg, "--info": args.info}
    given = [flag for flag, value in {**flags, "--shell-completion": args.shell_completion}.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{given[1]}: together with {given[0]}; expected one of them; remove the other")
    if args.resolve and not args.cfg:
        raise ConfigError("--resolve: without --cfg; expected --cfg job --resolve; add --cfg or remove it")
    if args.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun: not supported, as it runs what a pickle says; expected the saved config.yaml; use "
            "--config-dir with the output folder of the job"
        )


def _dispatch(hydra: Hydra, args: Namespace) -> int:
    if args.help:
        from runner.help import group_help, overview

        _print(group_help(args.overrides[0], _options(hydra)) if args.overrides else overview(_options(hydra)))
        return 0
    name = args.config_name or CONFIG_NAME
    sweep = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    # No .hydra folder: a job saves its configuration with its results. (HydraConf has this key; no YAML can change it.)
    overrides = ["hydra.output_subdir=null", *(_lenient(hydra, text, sweep) for text in args.overrides)]
    if args.shell_completion:
        _composing(lambda: hydra.shell_completion(config_name=name, overrides=args.overrides))
        return 0
    if args.hydra_help:
        _composing(lambda: hydra.hydra_help(config_name=name, args_parser=get_args_parser(), args=args))
        return 0
    if args.cfg or args.info:
        return _print_configuration(hydra, args, name, overrides)
    if sweep:
        return _sweep(hydra, name, overrides)
    done = _composing(lambda: hydra.run(config_name=name, task_function=run_one, overrides=overrides))
    return int(done.return_value)


def _sweep(hydra: Hydra, name: str, overrides: list[str]) -> int:
    """All jobs of a sweep, each whatever became of the others. The exit code is 0, or the first that asks for a person;
    75 when all that is wrong is that jobs want to be run again."""
    overrides = [*(text for text in overrides if not text.startswith("hydra.mode=")), "hydra.mode=MULTIRUN"]
    folder = _composing(lambda: hydra.compose_config(name, overrides, RunMode.MULTIRUN).hydra.sweep.dir)
    try:
        batches = _composing(lambda: hydra.multirun(config_name=name, task_function=run_one, overrides=overrides))
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("submitit", "ray"):
            raise
        raise Interrupted(
            f"hydra/launcher: {_one_line(error)[:500]}; expected a result of every job; look at its log in {folder}, "
            "then run the same command again: jobs go on where they stopped"
        ) from error
    finally:
        _mask_record(folder)
    results = [job for batch in batches or () for job in batch]
    codes = [int(job.return_value) for job in results]
    failed = [
        f"  job {index} (exit code {code}): {' '.join(job.overrides)}"
        for index, (job, code) in enumerate(zip(results, codes, strict=True))
        if code
    ]
    _say("\n".join([f"{len(codes) - len(failed)} of {len(codes)} jobs done", *failed]))
    bad = [code for code in codes if code]
    return next((code for code in bad if code != Interrupted.exit_code), bad[0] if bad else 0)


def _mask_record(folder: str) -> None:
    """Hydra's record of a sweep holds the command line as it was typed: credentials are taken out of it."""
    file = Path(folder) / "multirun.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if mask(text) != text:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(mask(text), encoding="utf-8")
        partial.replace(file)


def _print_configuration(hydra: Hydra, args: Namespace, name: str, overrides: list[str]) -> int:
    def show() -> None:
        if args.cfg:
            hydra.show_cfg(name, overrides, cfg_type=args.cfg, package=args.package, resolve=args.resolve)
        else:
            hydra.show_info(args.info, config_name=name, overrides=overrides)

    with contextlib.redirect_stdout(io.StringIO()) as text:
        _composing(show)
    _print(mask(text.getvalue()).rstrip())
    return 0


@contextlib.contextmanager
def _hydra(args: Namespace) -> Iterator[Hydra]:
    """Hydra over the package's conf, and the user's own folder where one is given."""
    version.setbase("1.3")
    search_path = create_config_search_path(None)
    # In front of Hydra's own folder: conf/hydra says where Hydra writes, whichever YAML file a run begins with.
    search_path.prepend("main", args.config_path or "pkg://conf")
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise ConfigError(
                f"--config-dir: {args.config_dir!r} is no folder; expected one with YAML files; correct it"
            )
        search_path.prepend("command-line", f"file://{folder}")
    try:
        yield Hydra.create_main_hydra2(task_name="runner", config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def _options(hydra: Hydra) -> dict[str, list[str]]:
    """The choices of each group, those of the user's folder among them."""
    loader = hydra.config_loader
    groups = [name for name in loader.list_groups("") if name != "hydra"]
    return {name: sorted(loader.get_group_options(name, ObjectType.CONFIG)) for name in groups}


def _lenient(hydra: Hydra, override: str, sweep: bool) -> str:
    """`key=value` as Hydra's "set, whether the YAML has it or not": which keys there are is config.load's to say, which
    knows the ones that a short YAML leaves out, and names the nearest to a wrong one.

    A value that Hydra's grammar cannot read, as `{{ text }}` or `lang == 'en'`, is text as it stands. Not one that was
    meant as a list, or in a sweep as several values: there quotes within quotes say what is what.
    """
    key, separator, value = override.partition("=")
    plain = separator and not set("@/:~+ ").intersection(key) and key.split(".")[0] != "hydra"
    if not plain or key in hydra.config_loader.list_groups(""):
        return override
    try:
        several = OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        if not (value.lstrip().startswith("[") or _is_mapping(value) or (sweep and "," in value)):
            value = QuotedString(value, Quote.single).with_quotes()
    else:
        if several and not sweep:
            raise ConfigError(
                f"{key}: {value!r} are several values; expected one; put quotes within quotes around text with commas, "
                f"as in {key}='\"one, text\"', brackets around a list, or add --multirun for a job with each value"
            )
    return f"++{key}={value}"


def _is_mapping(value: str) -> bool:
    text = value.lstrip()
    return text.startswith("{") and not text.startswith(("{{", "{%", "{#"))


def _composing(work: Callable[[], Any]) -> Any:
    """What Hydra does around run_one, which raises nothing: so all that is raised is about the configuration."""
    try:
        return work()
    except MissingConfigException as error:
        raise ConfigError(_missing(error)) from None
    except OverrideParseException as error:
        raise ConfigError(_unreadable(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"YAML: {_one_line(error)}; expected `key: value` lines; correct the file") from None
    except (HydraException, OmegaConfBaseException) as error:
        cause = f" ({_one_line(error.__cause__)})" if error.__cause__ and str(error.__cause__) else ""
        raise ConfigError(
            f"configuration: {_one_line(error) or 'cannot be composed'}{cause}; expected key=value or group=option; "
            "see --help"
        ) from None
    except (ValueError, OSError, AssertionError) as error:
        raise ConfigError(f"configuration: {_one_line(error)}; expected YAML files that compose; correct it") from None


def _missing(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"--config-name: {option!r} is not found; expected a YAML file of --config-dir; check the spelling"
    if group == "hydra/launcher" and option.startswith("submitit_"):
        return (
            "hydra/launcher=slurm: the package hydra-submitit-launcher is not installed; expected "
            "batch-inference-runner[slurm]; install it, or submit jobs/slurm/*.sbatch, which needs nothing"
        )
    options = [name for name in error.options or () if name != option]
    path = " (for a folder or hub id: model=local model.path=...)" if group.split("/")[0] == "model" else ""
    return (
        f"{group}: no option {option!r}; expected one of {', '.join(options) or '(there are none)'}{path}; "
        + schema.advice(option, options, "choose one, or add your own YAML with --config-dir")
    )


def _unreadable(error: OverrideParseException) -> str:
    reason = _one_line(error.message.split("See https://")[0])
    return (
        f"{error.override.lstrip('+')}: {reason}; expected key=value; put quotes within quotes around text with "
        "spaces, commas or signs, as in 'task.prompt=\"{{ text }}, in short:\"'"
    )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # may not have the characters of prompts: PYTHONIOENCODING, old locales
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    print(mask(text), file=sys.stderr, flush=True)


def _internal_error(error: Exception, folder: Path | None) -> int:
    """Reports a defect: one line for the person, the traceback in a file."""
    text = mask("".join(traceback.format_exception(error)))
    try:
        if folder is None:
            raise OSError
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "error.log"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')}\n{text}\n")
    except OSError:
        handle, name = tempfile.mkstemp(prefix="runner-error-", suffix=".log", text=True)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        log = Path(name)
    _say(f"internal error: {type(error).__name__}: {_one_line(error)[:500]}; this is a defect of the runner; see {log}")
    return INTERNAL_ERROR


if __name__ == "__main__":
    # Under its own name, so that a launcher on another machine can import what it is to call.
    from runner.__main__ import main as entry

    entry()
