"""What the engine and the runner reach on this machine, each figure beside the limit it is to be read against.

    python -m tests.bench ceilings                      read bandwidth and matrix rates
    python -m tests.bench engine MODEL WORKLOAD.json    one workload through the CPU engine; --floor: its least time
    python -m tests.bench compare COMMAND COMMAND ...   commands in turn, as ratios: a peer's driver, another checkout
    python -m tests.bench runner [ROWS]                 rows/s through source, task, journal and sink
    python -m tests.bench attention                     decode attention over caches in 16, 8 and 4 bits
    python -m tests.bench sharing [ROWS] [--workers N]  what it costs many workers to share a job by leases
    python -m tests.bench roles MODEL                   copies that do all of their rows, against prefill and decode
    python -m tests.bench start MODEL                   process start to first token

A workload is a list of {"prompt": [token ids], "n": output tokens}. Figures of one run are comparable with each other
only: compare two programs by running them in turn on the same machine.
"""

from __future__ import annotations

import argparse

from engines.threads import limit_spinning

limit_spinning()  # as the runner's own entry does, before torch is imported

from tests.bench import attention, ceilings, compare, engine, roles, runner, sharing, start  # noqa: E402

COMMANDS = {
    "attention": attention,
    "ceilings": ceilings,
    "compare": compare,
    "engine": engine,
    "roles": roles,
    "runner": runner,
    "sharing": sharing,
    "start": start,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.arguments(commands.add_parser(name, help=module.__doc__.splitlines()[0]))
    args = parser.parse_args()
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    main()
