"""What a probe measured on this machine, interpolated: bandwidth over working sets, matmuls over shapes."""

from __future__ import annotations

import numpy as np

from hardware.profile import Curves, HardwareProfile
from perfmodel.kernels.call import Array


def bandwidth_curve(curves: Curves) -> tuple[Array, Array]:
    """Log sizes and log rates. Small sets are slowed by the call itself, so a rate is at least that of larger sets."""
    points = sorted(curves.bandwidth, key=lambda p: p.working_set_bytes)
    rates = np.maximum.accumulate([p.bytes_per_second for p in reversed(points)])[::-1]
    return np.log([p.working_set_bytes for p in points]), np.log(rates)


class MatmulTimes:
    """Seconds of one product [rows, k] x [k, n] without its dispatch, from the probed shapes nearest to it.

    Of each probed [k, n] the seconds are interpolated over rows and scaled by k * n; shapes are weighted by the
    inverse fourth power of their distance in octaves. Every step keeps the order of rows: time never falls with them.
    """

    def __init__(self, hardware: HardwareProfile, curves: Curves, dtype: str) -> None:
        overhead = hardware.graph_node_seconds if hardware.kind == "gpu" else curves.elementwise_seconds
        peak = {str(d): rate for d, rate in hardware.peak_flops_per_second.items()}[dtype]
        groups: dict[tuple[int, int], dict[int, list[float]]] = {}
        for point in curves.matmul:
            if point.dtype == dtype:
                floor = 2 * point.m * point.k * point.n / peak
                work = max((point.seconds - overhead) / point.batch, floor)
                groups.setdefault((point.k, point.n), {}).setdefault(point.m, []).append(work)
        self.shapes = [
            (k, n, np.array(sorted(by_rows)), np.maximum.accumulate([min(by_rows[m]) for m in sorted(by_rows)]))
            for (k, n), by_rows in groups.items()
        ]

    def seconds(self, rows: Array, k: int, n: int) -> Array:
        """Of [rows, k] x [k, n], for an array of rows."""
        total, weights = 0.0, 0.0
        for inner, outer, known_rows, known_seconds in self.shapes:
            distance = np.hypot(np.log2(inner / k), np.log2(outer / n))
            weight = 1 / (0.05 + distance**4)
            beyond = np.maximum(rows / known_rows[-1], 1.0)  # more rows than probed: in proportion
            found = np.interp(rows, known_rows, known_seconds) * beyond * (k * n) / (inner * outer)
            total, weights = total + weight * np.log(found), weights + weight
        return np.exp(total / weights)
