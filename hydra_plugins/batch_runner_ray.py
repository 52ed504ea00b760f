"""hydra/launcher=ray: the jobs of a sweep as Ray tasks, on this machine or on a Ray cluster.

With shards of one job as the sweep (`shard.sharing=leases shard.count=8 shard.index=range(8)`) the tasks share its
chunks by leases, and its ledger says what is committed, as with any other way to start several processes. A task whose
worker or node dies is started again by Ray and goes on.

Hydra takes launchers from packages called hydra_plugins only, and imports them whenever it starts: no Ray here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from runner.errors import ConfigError


class RayLauncher(Launcher):
    """Satisfies Hydra's Launcher.

    Args:
        address: Of a Ray cluster, as `auto` or `ray://host:10001`; None: a cluster of this process, on this machine.
        num_cpus: That one job takes.
        num_gpus: That one job takes.
        max_retries: How often a job whose worker died is started again; -1: always.
    """

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float, max_retries: int) -> None:
        super().__init__()
        self._address = address
        self._options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": max_retries}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._function, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs and wait for them. Raises ConfigError if there is no Ray, and Ray's errors."""
        ray = _ray()
        setup_globals()
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if self._address is None else {}
        try:
            ray.init(address=self._address, logging_level="WARNING", **own)
        except Exception as error:  # of many types
            raise ConfigError(
                f"hydra.launcher.address: {self._address}: {' '.join(str(error).split())[:300]}; expected a Ray "
                "cluster that can be reached, or null for one on this machine; correct it, or try again"
            ) from error
        try:
            task = ray.remote(_run).options(**self._options)
            state = Singleton.get_state()
            arguments = (self._context, self._config, self._function, state)
            jobs = [task.remote(*arguments, list(words), initial_job_idx + i) for i, words in enumerate(job_overrides)]
            results: list[JobReturn] = ray.get(jobs)
        finally:
            ray.shutdown()
        return results


def _run(
    context: HydraContext,
    config: DictConfig,
    function: TaskFunction,
    state: dict[type, Singleton],
    overrides: list[str],
    number: int,
) -> JobReturn:
    """One job, in a process of Ray's."""
    Singleton.set_state(state)
    setup_globals()
    job = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = job.hydra.job.num = number
    return run_job(
        hydra_context=context,
        task_function=function,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports home unless it is told not to
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "hydra/launcher=ray: the package ray is not installed; expected batch-inference-runner[ray]; install it"
        ) from error
    return ray
