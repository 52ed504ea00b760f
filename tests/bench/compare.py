"""Commands in turn, several times: medians of their wall_s, and how many times the first one's each takes."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="prints a JSON object with wall_s as it ends")
    parser.add_argument("--repeat", type=int, default=3)


def wall_s(command: str) -> float:
    """wall_s of the last JSON line that the command prints. Raises SystemExit with what it printed if there is none."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return float(json.loads(lines[-1])["wall_s"])


def run(args: argparse.Namespace) -> None:
    times: dict[str, list[float]] = {command: [] for command in args.commands}
    for _ in range(args.repeat):
        for command, found in times.items():
            found.append(wall_s(command))
    first = statistics.median(times[args.commands[0]])
    for command, found in times.items():
        middle = statistics.median(found)
        print(json.dumps({"command": command, "wall_s": found, "median_s": middle, "ratio": round(middle / first, 2)}))
