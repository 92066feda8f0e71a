"""A made-up CPU for tests of the performance model: its curves follow simple laws, as a probe would write them."""

from __future__ import annotations

from hardware.profile import BandwidthPoint, Curves, HardwareProfile, MatmulPoint, MemoryLevel

DISPATCH_SECONDS = 1e-6
SHAPES = ((1, 128, 128), (1, 128, 384), (1, 1024, 1024), (8, 128, 384))


def matmul_seconds(rows: int, k: int, n: int) -> float:
    """50 GFLOP/s for many rows, and the weights at 20 GB/s for few."""
    return max(2 * rows * k * n / 50e9, 4 * k * n / 20e9)


def made_up_cpu(threads: int = 1) -> HardwareProfile:
    curves = Curves(
        threads=threads,
        elementwise_seconds=DISPATCH_SECONDS,
        linear_seconds=1.5 * DISPATCH_SECONDS,
        python_seconds=5e-7,
        bandwidth=tuple(
            BandwidthPoint(size, rate, 0.01)
            for size, rate in ((65536.0, 60e9), (1e6, 80e9), (16e6, 40e9), (128e6, 20e9))
        ),
        matmul=tuple(
            MatmulPoint("float32", b, m, k, n, DISPATCH_SECONDS + b * matmul_seconds(m, k, n), 16e6, 0.01)
            for b, k, n in SHAPES
            for m in (1, 4, 16, 64, 256)
        ),
    )
    return HardwareProfile(
        name="made-up-cpu",
        vendor="nobody",
        kind="cpu",
        compile_target="cpu",
        compute_units=2,
        warp_size=1,
        shared_memory_bytes=32768,
        peak_flops_per_second={"float32": 100e9, "bfloat16": 200e9},
        achieved_flops_per_second={"float32": 50e9, "bfloat16": 80e9},
        memory=(MemoryLevel("l3", 32e6, 100e9, 60e9), MemoryLevel("memory", 16e9, 40e9, 20e9)),
        launch_seconds=DISPATCH_SECONDS,
        graph_node_seconds=DISPATCH_SECONDS,
        sources=dict.fromkeys(
            (
                "compute_units",
                "warp_size",
                "shared_memory_bytes",
                "peak_flops_per_second",
                "achieved_flops_per_second",
                "memory",
                "launch_seconds",
                "graph_node_seconds",
                "measured",
            ),
            "derived: made up for tests",
        ),
        measured=(curves,),
    )
