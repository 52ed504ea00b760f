"""The name of a job, and with it its output folder: the same command gives the same name, on any day and machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from runner.secrets import mask

NAMING_GROUPS = ("model", "dataset", "task")
"""The choices that an unnamed job is called after."""
RUN_CONTROL = {
    "name", "mode", "host", "shard", "retry_errors", "max_runtime_s", "grace_s", "on_change", "max_error_rate",
    "max_consecutive_errors", "step_timeout_s", "output.folder", "output.journal_interval_s", "hydra",
}  # fmt: skip
"""Keys, with all below them, that steer a run without making it another job: never part of a name."""
LONGEST = 120


def job_name(given: str | None, choices: Mapping[str, str], overrides: Sequence[str], sweep: bool) -> str:
    """`given`, or the model, dataset and task chosen; in a sweep followed by what was overridden for this job.

    overrides: as on the command line. Their order does not matter; those of RUN_CONTROL are left out, so that a sweep
    that is run again with another time limit finds its folders.
    """
    base = given or safe("-".join(dict.fromkeys(str(choices.get(group)) for group in NAMING_GROUPS)))
    if not sweep:
        return base
    named = () if given else NAMING_GROUPS
    told = sorted(
        mask(override.lstrip("+")).replace("\\", "") for override in overrides if not _left_out(override, named)
    )
    return ",".join([base, safe(",".join(told))]) if told else base


def safe(text: str) -> str:
    """A text as part of a file name; a digest keeps those apart that were shortened or lost a character."""
    name = re.sub(r"[^\w.,=+-]", "-", text)
    if name == text and len(name.encode()) <= LONGEST and not name.startswith("."):
        return name
    digest = hashlib.blake2s(text.encode(errors="replace"), digest_size=4).hexdigest()
    short = name.encode()[:LONGEST].decode(errors="ignore").lstrip(".")
    return f"{short}-{digest}"


def _left_out(override: str, named: Sequence[str]) -> bool:
    key = re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0].replace("/", ".")
    parts = key.split(".")
    return key in named or any(".".join(parts[: i + 1]) in RUN_CONTROL for i in range(len(parts)))
