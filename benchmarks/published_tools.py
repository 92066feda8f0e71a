"""How fast published tools predict decoding, where they are installed: operating points per second, one after another.

python -m venv TOOLS && TOOLS/bin/pip install genz-llm==0.0.16 aiconfigurator-core==0.12.0
TOOLS/bin/python benchmarks/published_tools.py [--out measurements/DEVICE/published-tools.json]

A point is one decoding step of Llama-3.1-8B in bf16 on an H100 at one batch and context: the simplest that all of them
know. No point is asked twice. `python -m benchmarks.sweep_speed --model llama-3.1-8b` times ours. It needs nothing of
this project, so that it runs in an environment that holds the tools alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CONTEXT = (512, 1024, 2048, 3072, 4096)


def genz() -> Callable[[int, int], Any]:
    """GenZ-LLM-Analyzer (arXiv 2406.01698): a roofline of every operator."""
    from GenZ import decode_moddeling

    def step(batch: int, context: int) -> Any:
        return decode_moddeling(
            model="meta-llama/Llama-3.1-8B",
            batch_size=batch,
            input_tokens=context,
            output_tokens=1,
            Bb=1,
            system_name="H100_GPU",
            bits="bf16",
        )["Latency"]

    return step


def aiconfigurator() -> Callable[[int, int], Any]:
    """NVIDIA's AIConfigurator: measured kernel tables, interpolated by a compiled engine."""
    from aiconfigurator_core.sdk import common, config
    from aiconfigurator_core.sdk.backends.factory import get_backend
    from aiconfigurator_core.sdk.models import get_model
    from aiconfigurator_core.sdk.perf_database import get_database

    tables = Path(config.__file__).parents[1] / "systems" / "data" / "h100_sxm" / "gemm" / "vllm"
    database = get_database("h100_sxm", "vllm", max(path.name for path in tables.iterdir()))
    served = config.ModelConfig(
        tp_size=1,
        gemm_quant_mode=common.GEMMQuantMode.bfloat16,
        kvcache_quant_mode=common.KVCacheQuantMode.bfloat16,
        fmha_quant_mode=common.FMHAQuantMode.bfloat16,
    )
    model, backend = get_model("meta-llama/Meta-Llama-3.1-8B", served, "vllm"), get_backend("vllm")

    def step(batch: int, context: int) -> Any:
        at = config.RuntimeConfig(batch_size=batch, isl=context, osl=2)
        return backend.run_static_latency_only(model, database, at, "static_gen")

    return step


TOOLS = {"genz-llm": genz, "aiconfigurator-core": aiconfigurator}


def write(path: Path, text: str) -> None:
    """A whole file or the one before it: under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def main() -> None:
    """Time every tool that is installed, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    found = []
    for name, start in TOOLS.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        step = start()
        milliseconds = float(step(1, 1000))  # warms up
        rates = []
        for repeat in range(chosen.repeats):
            points = [(batch, context + repeat + 1) for batch in BATCH for context in CONTEXT]
            began = time.perf_counter()
            for point in points:
                step(*point)
            rates.append(len(points) / (time.perf_counter() - began))
        found.append(
            {"tool": name, "version": version, "points_per_second": statistics.median(rates), "rates": rates,
             "step_milliseconds_at_batch_1_context_1000": milliseconds}
        )  # fmt: skip
    document = {
        "command": "TOOLS/bin/python benchmarks/published_tools.py",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",  # noqa: UP017  # the tools' environment may be older
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "tools": found,
    }
    text = json.dumps(document, indent=1) + "\n"
    if chosen.out is not None:
        try:
            write(chosen.out, text)
        except OSError as error:
            sys.exit(f"cannot write {chosen.out}: {error.strerror or error}")
    print(text, end="")


if __name__ == "__main__":
    main()
