"""`ridgepoint serving`. Torch-free; tables and NumPy are imported when used."""

from __future__ import annotations

from typing import Annotated

import typer

from hardware.files import plain
from hardware.profile import load_profile
from perfmodel import cli_options as options
from perfmodel.terminal import Json, ms, print_json, print_table
from runtime.config import DecodingConfig

FIGURES = ("active", "mean_tpot_seconds", "median_itl_seconds", "decode_seconds", "prompt_seconds", "bound_seconds",
           "output_tokens_per_second")  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to the root command."""
    app.command()(serving)


def serving(
    model: options.Model,
    hardware: options.Hardware,
    sequences: Annotated[str, typer.Option(help="Requests in flight: numbers with commas.")] = "1,4,16,64,256",
    prompt: Annotated[float, typer.Option(help="Mean tokens of a prompt.")] = 1024,
    generated: Annotated[float, typer.Option(help="Mean tokens that a request generates.")] = 1024,
    variation: Annotated[float, typer.Option(help="Coefficient of variation of the generated tokens.")] = 0.0,
    temperature: options.Temperature = 0.0,
    dtype: options.DType = None,
    weights: options.Weights = None,
    expert_weights: options.ExpertWeights = None,
    activations: options.Activations = None,
    cache_dtype: options.CacheDType = None,
    tensor_parallel: options.TensorParallel = 1,
    expert_parallel: options.ExpertParallel = 1,
    expert_coverage: options.Coverage = None,
    engine: Annotated[str, typer.Option(help="A known engine, or its YAML file.")] = "vllm",
    as_json: Json = False,
) -> None:
    """Predict a server whose finished requests are replaced at once: the time between tokens, and tokens per second.

    Autoregressive decoding; a request that arrives has its prompt read in the steps of the others.
    """
    import numpy as np

    from perfmodel.serving import Load, serve

    device = load_profile(hardware)
    precision = options.precision_of(model, dtype, device, weights, expert_weights, activations, cache_dtype)
    at = options.setting_of(model, device, precision, expert_coverage, engine, tensor_parallel, expert_parallel)
    numbers = options.numbers("sequences", sequences, float)
    load = Load(
        np.array(numbers), prompt, generated, variation, drawn=DecodingConfig(temperature=temperature).temperature > 0
    )
    found = serve(at, load)
    rows = [
        {name: float(np.broadcast_to(getattr(found, name), len(numbers))[i]) for name in FIGURES}
        for i in range(len(numbers))
    ]
    header = {"model": at.spec.name, "hardware": device.name, "engine": at.engine.name, "precision": str(at.precision),
              "parallel": plain(at.parallel), "expert_coverage": str(at.coverage), "prompt": prompt,
              "generated": generated, "variation": variation, "temperature": temperature}  # fmt: skip
    if as_json:
        spread = at.spread()
        return print_json(
            header | {"spread": spread, "rows": [{"sequences": n, **r} for n, r in zip(numbers, rows, strict=True)]}
        )
    experts = f", experts {at.coverage}" if at.spec.moe_layers else ""
    print_table(
        f"{at.spec.name} ({at.precision}) on {device.name}, {at.parallel}, {at.engine.name}{experts}: prompts of "
        f"{prompt:g}, {generated:g} generated",
        ("in flight", "active", "mean TPOT ms", "median ITL ms", "step ms", "bound ms", "prompt ms", "tokens/s"),
        [
            (
                f"{n:g}",
                f"{r['active']:.0f}",
                *(ms(r[f"{name}_seconds"]) for name in ("mean_tpot", "median_itl", "decode", "bound", "prompt")),
                f"{r['output_tokens_per_second']:,.0f}",
            )
            for n, r in zip(numbers, rows, strict=True)
        ],
    )
