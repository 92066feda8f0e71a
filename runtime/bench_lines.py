"""The lines that `bench` prints. Torch-free."""

from __future__ import annotations

from runtime.measurement import Measurement, interval_name


def line(record: Measurement) -> str:
    """One record."""
    where = f"batch {record.workload.batch:<3} context {record.context:<5}"
    engine = record.kernels.engine
    if record.kind == "generation":
        length = record.acceptance_length
        full = record.full_tokens_per_second
        return (
            f"{record.decoding.sampler:<15} {record.batching:<10} {engine:<8} {where} "
            f"{record.tokens_per_second:9.1f} tokens/s +-{record.spread:.0%}"
            + (f", {full:.1f} in full steps" if full is not None else "")
            + (f"  {length:.2f} tokens a step (K = {record.decoding.draft_tokens})" if length is not None else "")
        )
    if record.kind == "operator":
        return f"  {record.operator:<15} {record.median_seconds * 1e3:9.4f} ms +-{record.spread:.0%}"
    return (
        f"{record.forward:<6} {engine:<8} {where} slots {record.slots:<3} {record.median_seconds * 1e3:9.3f} ms "
        f"+-{record.spread:.0%}  {record.experts_per_layer:.1f} experts a layer"
    )


def total(operators: float, forward: float) -> str:
    """Seconds of a forward's operators beside the forward's own."""
    return (
        f"  {'together':<15} {operators * 1e3:9.4f} ms, the sampler left out: {operators / forward:.0%} of the forward"
    )


def speedup(batching: str, batch: int, found: tuple[float, float, float], rounds: int) -> str:
    """Throughput over that of autoregressive decoding: the median of rounds, and its interval."""
    ratio, low, high = found
    where = f"{batching} batch {batch}"
    return f"{where}: {ratio:.2f}x autoregressive decoding ({interval_name(rounds)} {low:.2f}-{high:.2f})"
