"""What a kernel must move and compute, and how timings are shown; timing itself needs a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from runtime.kernels import timing
from runtime.kernels.problem import ODD, SLIDING, Problem
from runtime.kernels.registry import KERNELS
from runtime.kernels.selection import device_target
from runtime.kernels.timing import Timed, Timer, Traffic, main, rows, traffic
from tests import faulty_kernels as made_up


def needed(name: str, problem: Problem, dtype: torch.dtype = torch.float32, **changes: Any) -> Traffic:
    kernel = KERNELS[name]
    arguments = kernel.inputs(problem, dtype, "cpu") | changes
    return traffic(kernel, arguments, kernel.reference()(**arguments))


@pytest.mark.parametrize("name", KERNELS)
def test_more_tokens_move_more(name: str) -> None:
    problems = [Problem(ODD, batch, 5, 20) for batch in (1, 4)]
    few, many = (needed(name, problem) for problem in problems)
    assert 0 < few.moved_bytes < many.moved_bytes and few.flops <= many.flops


def test_a_cached_token_costs_a_key_and_a_value_however_many_slots_see_it() -> None:
    by_slots = []
    for slots in (1, 5):
        short, long = (needed("attention", Problem(ODD, 1, slots, context)) for context in (20, 21))
        by_slots.append(long.moved_bytes - short.moved_bytes)
    assert by_slots == [2 * ODD.num_key_value_heads * ODD.head_dim * 4] * 2


def test_a_window_bounds_what_attention_reads() -> None:
    near, far = (needed("attention", Problem(SLIDING, 1, 1, context)) for context in (30, 300))
    assert near == far != needed("attention", Problem(ODD, 1, 1, 300))


def test_only_experts_hit_are_read() -> None:
    problem = Problem(ODD, 4, 1)
    moved = [
        needed("experts", problem, chosen=torch.tensor(chosen, dtype=torch.int32)).moved_bytes
        for chosen in ([5, 5, 5, 5], [2, 2, 2, 2], [0, 2, 2, 5], [0, 1, 2, 3])
    ]
    expert = 3 * ODD.moe_intermediate_size * ODD.hidden_size * 4
    assert [b - a for a, b in pairwise(moved)] == [expert, expert, 2 * expert]


def test_the_table_puts_reasons_behind_timings() -> None:
    timed = Timed("attention", "", "bfloat16", {"BLOCK_M": 16}, Traffic(4_000_000, 8_000_000), (1e-6, 2e-6, 3e-6), 4e12)
    assert (timed.median_seconds, timed.bytes_per_second, timed.copy_share) == (2e-6, 2e12, 0.5)
    failed = replace(timed, seconds=(), outcome="does not fit")
    assert failed.median_seconds > timed.median_seconds and "median_seconds" not in failed.plain()
    lines = rows([timed, failed])
    assert "50.0%" in lines[1] and "BLOCK_M=16" in lines[1] and lines[2].endswith("BLOCK_M=16: does not fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no device cuda: torch sees 0 CUDA or ROCm devices"),
        (("--device", "cuda:1"), "no device cuda:1: torch sees 0"),
        (("--device", "cpu"), "unknown device 'cpu'; known: cuda, cuda:N"),
        (("--device", "cuda:x"), "unknown device 'cuda:x'"),
        (("--slots", "0"), "slots >= 1 must hold, but got 0"),
        (("--rounds", "0"), "rounds >= 1 must hold, but got 0"),
        (("--kernel", "rooter"), "unknown kernel 'rooter'"),
    ],
)
def test_what_cannot_be_timed_is_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--kernel", "attention", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and message in said.err


def test_nothing_is_recorded_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    recording: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(timing, "_timed", lambda *_: recording.append(torch.is_inference_mode_enabled()) or [])
    assert timing.time_tilings(KERNELS["attention"], Problem(ODD)) == [] and recording == [True]


def test_each_copy_of_the_arguments_has_the_next_routes() -> None:
    """Of a made-up kernel with routes, which runs on this CPU."""
    seen: list[list[int]] = []

    def watched(x: Any, chosen: torch.Tensor, *, tiling: Any) -> Any:
        seen.append(chosen.tolist())
        return x

    kernel, rows = made_up.MadeUp("routed", "made up", run=made_up.routed), np.array([[0, 1, 2], [3, 4, 5], [1, 1, 1]])
    timer = Timer(kernel, Problem(ODD, 3), "float32", "cpu", rows)
    timer._run = watched
    graph = timer.graph({})
    assert timer.sample(graph) > 0 and timer.calls == 2
    assert seen == [[0, 1, 2], [3, 4, 5]]


def test_traffic_is_the_mean_over_the_routes() -> None:
    kernel, expert = KERNELS["experts"], 3 * ODD.moe_intermediate_size * ODD.hidden_size * 4
    one, two = np.array([[2, 2, 2]]), np.array([[0, 1, 5]])  # the third token skips
    timers = [Timer(kernel, Problem(ODD, 3), "float32", "cpu", rows) for rows in (one, two, np.concatenate([one, two]))]
    moved = [timer.traffic.moved_bytes for timer in timers]
    assert moved[1] - moved[0] == expert and moved[2] == sum(moved[:2]) / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pair_on_a_gpu_is_of_the_same_calls() -> None:
    rows = np.arange(3 * 17).reshape(3, 17) % 6
    timer = Timer(KERNELS["experts"], Problem(ODD, 1, 17), "bfloat16", "cuda", rows)
    tiling = KERNELS["experts"].tilings(device_target("cuda"), Problem(ODD, 1, 17))[0]
    graph = timer.graph(tiling)
    samples = [timer.sample(graph) for _ in range(5)]
    assert all(0 < seconds < 0.01 for seconds in samples)
