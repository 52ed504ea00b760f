"""Process start to first token: a fresh interpreter that loads a model and draws one token."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

CODE = """
import sys
from engines.api import EngineSettings, Request, SamplingParams
from engines.cpu.offers import Config
from engines.load import load_engine
engine = load_engine(EngineSettings("cpu", sys.argv[1], "bfloat16", Config(max_model_len=2048, kv_cache_bytes=1 << 30)))
engine.submit([Request(0, "generate", list(range(100, 132)), SamplingParams(max_tokens=1, ignore_eos=True))])
while engine.num_unfinished:
    engine.step()
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=3)


def run(args: argparse.Namespace) -> None:
    for _ in range(args.repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", CODE, args.model], check=True)
        print(json.dumps({"start_to_first_token_s": round(time.perf_counter() - start, 2)}), flush=True)
