"""Published rows: read strictly, interpreted without a guess."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import load_profile, save_profile
from perfmodel.model_spec import load_spec
from perfmodel.precision import quantised, uniform
from perfmodel.published.interpret import interpret
from perfmodel.published.names import Catalog, Unclear, runtime, served_precision
from perfmodel.published.points import (
    KernelPoint,
    Point,
    ServedPoint,
    TidarForwardPoint,
    TidarThroughputPoint,
    Unit,
)
from perfmodel.published.rows import COLUMNS, Row, read_rows

GEMM = {
    "id": "g", "kind": "B", "hardware": "H100 SXM", "model_or_op": "GEMM (linear layer)", "dtype": "bfloat16",
    "engine": "vLLM 0.24.0 [torch]", "batch": "16", "context_or_shape": "M=16,N=4096,K=2048",
    "metric": "kernel_time", "value": "12.5", "unit": "us", "source_url": "https://github.com/a/b/c.md", "notes": "",
}  # fmt: skip
MOE = GEMM | {
    "model_or_op": "fused MoE Mixtral-8x7B TP2", "notes": "",
    "context_or_shape": "hidden 4096, inter 14336, E8 top2, tokens=16, balanced",
}  # fmt: skip
ATTENTION = GEMM | {
    "model_or_op": "decode attention", "dtype": "fp8 KV", "context_or_shape": "q32/kv8/hd128, ctx=4096",
}  # fmt: skip
REDUCE = GEMM | {
    "kind": "A", "model_or_op": "all_reduce", "dtype": "16-bit", "engine": "NCCL 2.29.2", "batch": "",
    "metric": "latency", "context_or_shape": "gpus=8, 8192 elements x 2 B = 16384 B",
}  # fmt: skip
SERVED = GEMM | {
    "kind": "C", "hardware": "2xH100 SXM", "model_or_op": "Llama-3.1-70B", "dtype": "fp8", "engine": "vllm 0.12.0 TP2",
    "context_or_shape": "ISL/OSL 1024/512", "metric": "mean_tpot", "value": "20", "unit": "ms",
}  # fmt: skip
TIDAR = {
    "id": "mt5k-greedy-h100-tf-b8", "hardware": "H100-SXM", "mode": "two_forward", "batch": "8", "draft_tokens": "16",
    "proposal_levels": "", "generated_tokens": "5000", "temperature": "0", "metric": "throughput_tok_s",
    "value": "900", "mean_acceptance_length": "6.5", "source": "Zyphra/vllm docs/x.md @0bfa5c58", "note": "",
}  # fmt: skip
FORWARD = TIDAR | {
    "metric": "forward_ms", "value": "20", "mean_acceptance_length": "", "note": "verify forward, 8x17 tokens",
}  # fmt: skip


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def row_of(cells: dict[str, str]) -> Row:
    table: Any = "gpu" if "kind" in cells else "tidar"
    return Row(cells["id"], table, 2, cells, float(cells["value"]))


def found(cells: dict[str, str], **changes: str) -> Point | str:
    return interpret(row_of(cells | changes))


def point(cells: dict[str, str], **changes: str) -> Any:
    result = found(cells, **changes)
    assert not isinstance(result, str), result
    return result


def test_rows_of_both_tables_are_read(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "a.csv", GEMM))
    assert (row.id, row.value, row.unit, row.source, row.problem) == ("g", 12.5, "us", "a/b", None)
    (row,) = read_rows(write(tmp_path / "b.csv", TIDAR))
    assert (row.table, row.unit, row.source) == ("tidar", "tok/s", "Zyphra/vllm")


def test_columns_may_come_in_any_order_and_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = write(tmp_path / "a.csv", dict(reversed(GEMM.items()))).read_text()
    (tmp_path / "b.csv").write_text("\ufeff" + text)
    assert read_rows(tmp_path / "b.csv")[0].cells == GEMM


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (",".join(COLUMNS["gpu"]) + "\n", "has a header and no rows"),
        ("a,b\n1,2\n", "unknown 'a', 'b'"),
        (",".join(COLUMNS["gpu"][:-1]) + "\nx\n", "missing 'notes'"),
        (",".join([*COLUMNS["gpu"], "speed"]) + "\nx\n", "unknown 'speed'"),
        (",".join([*COLUMNS["gpu"], "id"]) + "\nx\n", "given twice 'id'"),
        (",".join(COLUMNS["tidar"]) + '\n"x\n', "not valid CSV"),
    ],
)
def test_a_file_that_is_no_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "a.csv")


def test_unknown_columns_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"known: id, kind, .*; or id, hardware, mode"):
        read_rows(write(tmp_path / "a.csv", {"id": "1", "speed": "2"}))


@pytest.mark.parametrize("name", ["missing.csv", "folder", "bytes.csv"])
def test_a_file_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.csv").write_bytes(b"id\xff\xfe\n")
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    "value", ["", "fast", "nan", "NaN", "inf", "-1", "0", "1,000", "12 us", "0x10", "1e999", "1e-12"]
)
def test_a_broken_value_is_the_rows_status_and_not_the_files_end(value: str, tmp_path: Path) -> None:
    broken, whole = read_rows(write(tmp_path / "a.csv", GEMM | {"value": value}, GEMM | {"id": "h"}))
    assert broken.value is None and str(interpret(broken)).startswith("value must be a number from 1e-09 to")
    assert not isinstance(interpret(whole), str)


def test_broken_lines_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", GEMM, GEMM, GEMM | {"id": ""})
    path.write_text(path.read_text() + "x,y\n\n")
    rows = read_rows(path)
    assert [r.problem for r in rows] == [
        None,
        "the id 'g' of line 3 was given in line 2",
        "line 4 has no id",
        "line 5 has 2 cells, but the header has 13",
    ]


@given(st.lists(st.text(max_size=12), min_size=13, max_size=13))
def test_any_cells_give_a_point_or_a_reason(cells: list[str]) -> None:
    row = Row("x", "gpu", 2, dict(zip(COLUMNS["gpu"], cells, strict=True)), 1.0)
    assert isinstance(interpret(row), (str, Point))


@given(st.sampled_from(sorted(GEMM)), st.text(max_size=20), st.sampled_from([GEMM, MOE, ATTENTION, REDUCE, SERVED]))
def test_any_cell_may_be_odd(column: str, text: str, cells: dict[str, str]) -> None:
    assert isinstance(interpret(Row("x", "gpu", 2, cells | {column: text}, 1.0)), (str, Point))


@given(st.sampled_from(sorted(TIDAR)), st.text(max_size=20), st.sampled_from([TIDAR, FORWARD]))
def test_any_cell_of_the_other_table_may_be_odd(column: str, text: str, cells: dict[str, str]) -> None:
    assert isinstance(interpret(Row("x", "tidar", 2, cells | {column: text}, 1.0)), (str, Point))


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("H100 SXM", "h100-sxm", 1),
        ("H100-SXM", "h100-sxm", 1),
        ("8xH100 SXM", "h100-sxm", 8),
        ("2xH200 SXM", "h200", 2),
        ("B200 SXM", "b200", 1),
        ("A100 SXM 80GB", "a100-80gb-sxm", 1),
        ("8xMI300X", "mi300x", 8),
        ("MI355X", "mi355x", 1),
        ("RTX 4090", "rtx-4090", 1),
        ("h200", "h200", 1),  # a profile's own name is that profile
        ("NVIDIA H100 SXM", "h100-sxm", 1),
        ("H100 SXM 80GB", "h100-sxm", 1),
        ("8xH100 80GB SXM5", "h100-sxm", 8),
        ("H100 PCIe 80GB", "h100-pcie", 1),
        ("H200 SXM 141GB", "h200", 1),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm", 1),
        ("AMD Instinct MI300X", "mi300x", 1),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 1),
    ],
)
def test_devices_by_their_published_names(text: str, name: str, count: int) -> None:
    device, number = Catalog().device(text)
    assert (device.name, number) == (name, count)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("H100", "SXM, PCIe or NVL"),
        ("8xH100", "SXM, PCIe or NVL"),
        ("H200", "SXM or NVL"),
        ("A100", "40 or 80 GB"),
        ("A100 SXM", "40 or 80 GB"),
        ("B200", "SXM module or half of a GB200"),
        ("NVIDIA H100", "SXM, PCIe or NVL"),
        ("H100 80GB", "SXM or PCIe"),
        ("H200 141GB", "SXM or NVL"),
        ("A100-SXM4-40GB", "no profile"),
        ("H100 SXM 96GB", "no profile"),
        ("8xMI350", "MI350X or an MI355X"),
        ("SM100 (B200-class, name not shown)", "not stated for certain"),
        ("sm_90 (presumably H100 SXM)", "not stated for certain"),
        ("H100/H200", "not stated for certain"),
        ("not stated (TP2)", "not stated for certain"),
        ("MI300X (VF)", "a variant"),
        ("A100 PCIe", "no profile; known: a100-80gb-sxm, b200"),
        ("H100 NVL", "no profile"),
        ("GB200", "no profile"),
        ("0xH100 SXM", "no devices"),
        ("", "not stated"),
    ],
)
def test_an_unclear_device_is_refused(text: str, reason: str) -> None:
    assert reason in str(found(GEMM, hardware=text))


def test_a_new_profile_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hardware").mkdir()
    new = dataclasses.replace(load_profile("h100-sxm"), name="next-gpu")
    save_profile(new, tmp_path / "hardware" / "next-gpu.yaml")
    assert "no profile" in str(found(GEMM, hardware="Next GPU"))
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path))
    assert point(GEMM, hardware="Next GPU").hardware == new
    assert point(GEMM, hardware="next-gpu").hardware == new
    monkeypatch.delenv("RIDGEPOINT_HOME")
    path = str(tmp_path / "hardware" / "next-gpu.yaml")
    assert point(GEMM, hardware=path).hardware == new
    assert point(SERVED, hardware=f"2x{path}").devices == 2
    assert "cannot read" in str(found(GEMM, hardware=str(tmp_path / "none.yaml")))


def test_a_gemm_is_read_with_its_precision() -> None:
    call = point(GEMM).call
    assert (call.m, call.n, call.k, call.weights, call.activations, call.cold) == (
        16, 4096, 2048, "bfloat16", "bfloat16", True,
    )  # fmt: skip
    assert (point(GEMM, dtype="int4_wo").call.weights, point(GEMM, dtype="int4_wo").call.activations) == (
        "int4",
        "bfloat16",
    )
    assert point(GEMM, dtype="16-bit").operator == "gemm bfloat16"


@pytest.mark.parametrize(
    ("shape", "batch", "sizes"),
    [
        ("M=16,N=4096,K=2048", "16", (16, 4096, 2048)),
        ("M=16,N=4096,K=2048", "", (16, 4096, 2048)),
        ("m,n,k=256,512,1024", "", (256, 512, 1024)),
        ("N,K=13312,16384", "2", (2, 13312, 16384)),
        ("N=2112,K=7168", "64", (64, 2112, 7168)),
        ("1024x1024x1024", "", (1024, 1024, 1024)),
        ("1024x10240x5120 MxNxK", "", (1024, 10240, 5120)),
        ("16x4096x2048 (MxNxK)", "16", (16, 4096, 2048)),
        ("M=N=K=8192", "", (8192, 8192, 8192)),
        ("M=16, N=K=4096", "16", (16, 4096, 4096)),
    ],
)
def test_shapes_of_a_gemm(shape: str, batch: str, sizes: tuple[int, int, int]) -> None:
    call = point(GEMM, context_or_shape=shape, batch=batch).call
    assert (call.m, call.n, call.k) == sizes


@pytest.mark.parametrize(
    ("cells", "changes", "reason"),
    [
        (GEMM, {"batch": "1-4", "context_or_shape": "N,K=13312,16384"}, "M (the batch) must be one whole number"),
        (GEMM, {"batch": "", "context_or_shape": "N,K=13312,16384"}, "M (the batch) is not stated"),
        (GEMM, {"batch": "32"}, "the batch is 32, but M is 16"),
        (GEMM, {"context_or_shape": "4224x2048x8192"}, "which size is M, N and K"),
        (GEMM, {"context_or_shape": "M=16"}, "N and K are needed"),
        (GEMM, {"context_or_shape": "M=16,N=0,K=4"}, "must be >= 1"),
        (GEMM, {"context_or_shape": f"M=16,N={10**13},K=4096"}, "at most 12 digits"),
        (GEMM, {"dtype": ""}, "precision is not stated"),
        (GEMM, {"dtype": "fp4"}, "does not say what weights and activations"),
        (GEMM, {"dtype": "bf16 (presumed)"}, "not stated for certain"),
        (GEMM, {"hardware": "2xH100 SXM"}, "a kernel runs on one device"),
        (GEMM, {"metric": "achieved_bandwidth", "unit": "GB/s"}, "which bytes"),
        (GEMM, {"metric": "kernel_time", "unit": "TFLOPS"}, "must be in ns, us, ms, s"),
        (GEMM, {"metric": "tflops", "unit": "us"}, "must be in GFLOPS"),
        (GEMM, {"kind": "E"}, "kind must be A, B, C or D"),
        (GEMM, {"kind": "A", "metric": "tflops_mean_best_shape", "unit": "TFLOPS"}, "an input of the profile"),
        (GEMM, {"model_or_op": "grouped GEMM masked"}, "grouped GEMM"),
        (GEMM, {"context_or_shape": "M=16,N=4096,K=٤"}, "digits from 0 to 9"),
        (GEMM, {"context_or_shape": "M=16,N=4096,K=2048, groups=4"}, "what 'groups=4' of the shape"),
        (GEMM, {"batch": "0", "context_or_shape": "N=4096,K=2048"}, ">= 1, but is '0'"),
        (GEMM, {"model_or_op": "Grouped GEMM masked"}, "grouped GEMM"),
        (GEMM, {"model_or_op": "2:4 sparse GEMM"}, "other words"),
        (GEMM, {"model_or_op": "GEMM + all_reduce fused"}, "other words"),
        (GEMM, {"model_or_op": "batched GEMM"}, "other words"),
        (GEMM, {"model_or_op": "MoE GEMM (ck)"}, "other words"),
        (GEMM, {"model_or_op": "GEMM gate_up with SwiGLU fused"}, "other words"),
        (GEMM, {"hardware": "MI300X", "engine": "cuBLASLt"}, "NVIDIA alone"),
        (GEMM, {"engine": "hipBLASLt"}, "AMD alone"),
        (MOE, {"model_or_op": "fused MoE Mixtral-8x7B TP4 EP2"}, "(EP) is not modelled"),
        (MOE, {"context_or_shape": MOE["context_or_shape"].replace("balanced", "power_law_400")}, "must be <= 10"),
        (MOE, {"context_or_shape": MOE["context_or_shape"].replace("E8", "E999999999")}, "at most 4096 experts"),
        (MOE, {"context_or_shape": MOE["context_or_shape"] + ", shared=1"}, "what 'shared=1'"),
        (MOE, {"model_or_op": "fused MoE E256,N512 TP?"}, "(TP) is not stated"),
        (MOE, {"model_or_op": "fused MoE Mixtral-8x7B"}, "(TP) is not stated"),
        (MOE, {"context_or_shape": "hidden 4096, inter 14336, E8 top2, tokens=16"}, "routed to experts"),
        (MOE, {"context_or_shape": "tokens=16", "model_or_op": "fused MoE Foo TP1"}, "model 'Foo' is not known"),
        (MOE, {"batch": "8"}, "the batch is 8, but tokens is 16"),
        (MOE, {"context_or_shape": "hidden 4096, inter 14336, E8 top9, tokens=16, balanced"}, "cannot be"),
        (ATTENTION, {"context_or_shape": "ctx=4096"}, "heads are not stated"),
        (ATTENTION, {"context_or_shape": "q32/kv8/hd128"}, "context is not stated"),
        (ATTENTION, {"context_or_shape": "q30/kv8/hd128, ctx=1024"}, "multiple of KV heads"),
        (ATTENTION, {"dtype": "mixed"}, "what the KV cache is stored in"),
        (ATTENTION, {"batch": ""}, "the batch is not stated"),
        (ATTENTION, {"model_or_op": "MLA decode attention"}, "MLA"),
        (ATTENTION, {"model_or_op": "mla decode attention"}, "MLA"),
        (ATTENTION, {"model_or_op": "decode attention, window 128"}, "other words"),
        (ATTENTION, {"model_or_op": "sliding-window decode attention"}, "other words"),
        (ATTENTION, {"model_or_op": "decode attention (speculative, 4 query tokens)"}, "other words"),
        (ATTENTION, {"context_or_shape": "q32/kv8/hd128, ctx=4096, window=1024"}, "what 'window=1024'"),
        (ATTENTION, {"context_or_shape": "q32/kv8/hd128, ctx=4096, qlen=4"}, "what 'qlen=4'"),
        (REDUCE, {"hardware": "MI300X"}, "NCCL runs on devices of NVIDIA alone"),
        (REDUCE, {"model_or_op": "RCCL all_reduce busbw"}, "RCCL runs on devices of AMD alone"),
        (REDUCE, {"context_or_shape": "8192 elements x 2 B = 16384 B"}, "how many devices"),
        (REDUCE, {"context_or_shape": "gpus=8"}, "how many bytes"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_not_fully_stated_is_refused(
    cells: dict[str, str], changes: dict[str, str], reason: str
) -> None:
    assert reason in str(found(cells, **changes))


def test_a_moe_layer_is_split_and_its_experts_are_counted() -> None:
    call = point(MOE).call
    assert (call.expert_size, call.experts, call.top_k, call.distinct) == (7168, 8, 2, 8)
    named = MOE | {"context_or_shape": "tokens=1", "batch": "1"}
    assert point(named).call.distinct == pytest.approx(2)  # one token's routing needs no statement
    assert point(named).call.expert_size == 7168  # the sizes of the model that is named
    drawn = MOE | {"context_or_shape": "tokens=16", "notes": "benchmark_moe.py"}
    assert point(drawn).call.distinct == pytest.approx(8 * (1 - 0.75**16))


def test_bus_bandwidth_is_the_ring_s_bytes_over_the_time() -> None:
    """16 MB over 8 devices at 100 GB/s: each device sends 2 * 7/8 of it."""
    found = point(REDUCE, metric="bus_bandwidth", unit="GB/s", value="100", context_or_shape="gpus=8, 16MB", dtype="")
    assert found.call.size_bytes == 2**24
    assert found.measured_seconds == pytest.approx(2 * 7 / 8 * 2**24 / 100e9)


@pytest.mark.parametrize(("text", "size"), [("16KB", 2**14), ("65KB", 2**16), ("1MB", 2**20), ("8GB", 2**33)])
def test_rounded_message_sizes_are_powers_of_two(text: str, size: int) -> None:
    shape = f"gpus=8, {text}"
    assert point(REDUCE, metric="bus_bandwidth", unit="GB/s", context_or_shape=shape).call.size_bytes == size


@given(st.floats(1e-3, 1e6))
def test_a_unit_and_its_inverse_agree(seconds: float) -> None:
    for unit in (Unit("ms", 1e-3), Unit("tok/s", 1.0, 1.0), Unit("TFLOPS", 1e12, 3e10)):
        assert unit.seconds(unit.value(seconds)) == pytest.approx(seconds)


def test_the_same_time_in_other_units_is_the_same_point() -> None:
    flops = 2 * 16 * 4096 * 2048
    micro, milli = point(GEMM), point(GEMM, value="0.0125", unit="ms")
    rate = point(GEMM, metric="tflops", unit="TFLOPS", value=repr(flops / 12.5e-6 / 1e12))
    assert milli.measured_seconds == pytest.approx(micro.measured_seconds)
    assert rate.measured_seconds == pytest.approx(micro.measured_seconds)
    assert (micro.unit.is_rate, rate.unit.is_rate) == (False, True)


def test_a_served_model() -> None:
    found = point(SERVED)
    assert isinstance(found, ServedPoint)
    assert (found.model.name, found.tensor, found.expert, found.devices) == ("llama-3.1-70b", 2, 1, 2)
    assert (found.batch, found.prompt, found.generated, found.metric) == (16, 1024, 512, "per_token")
    assert found.precision == quantised("fp8") and not found.cache_stated
    assert found.engine == "vllm" and found.measured_seconds == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ("ISL/OSL 1024/512", (1024, 512, "")),
        ("1024/512", (1024, 512, "")),
        ("10K/1K", (10000, 1000, "")),
        ("ISL 128, OSL 4096", (128, 4096, "")),
        ("~20k in / 2k out", (20000, 2000, "")),
        ("5-token prompt, ~200 new", (5, 200, "")),
        ("lm-arena-chat, mean output 647 tok", (None, 647, "lm-arena-chat")),
        ("ISL 4096 / OSL 2048", (4096, 2048, "")),
        ("ISL=1024 OSL=1024", (1024, 1024, "")),
        ("1024 in, 512 out", (1024, 512, "")),
    ],
)
def test_lengths_of_requests(shape: str, lengths: tuple[float | None, float, str]) -> None:
    found = point(SERVED, context_or_shape=shape)
    assert (found.prompt, found.generated, found.workload) == lengths


def test_lengths_that_were_counted_win_over_nominal_ones() -> None:
    found = point(SERVED, context_or_shape="random 1000/1000", notes="mean in/out actually 610/422 tok; x")
    assert (found.prompt, found.generated) == (610, 422)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_or_op": "LLaDA2.0-mini"}, "how many forwards fill a block is not stated"),
        ({"model_or_op": "Dream-v0-Instruct-7B"}, "how many forwards fill a block"),
        ({"model_or_op": "SDAR-8B-Chat-b32"}, "how many forwards fill a block"),
        ({"model_or_op": "Zyphra/ZAYA1-8B-diffusion-preview"}, "how many forwards fill a block"),
        ({"model_or_op": "Llama-3.1-70B-FP8", "dtype": "bf16"}, "stored in fp8, but the precision is 'bf16'"),
        ({"model_or_op": "Llama-3.1-70B-FP8", "dtype": "nvfp4"}, "stored in fp8"),
        ({"model_or_op": "gpt-oss-120b", "dtype": "bf16"}, "published in mxfp4 alone"),
        ({"notes": "ngram drafting, 3 tokens"}, "speculation"),
        ({"notes": "with a draft model"}, "speculation"),
        ({"notes": "enforce-eager"}, "say 'eager'"),
        ({"notes": "disaggregated: prefill on other GPUs"}, "prefills ran on other devices"),
        ({"notes": "DP2"}, "data or pipeline parallelism"),
        ({"notes": "request rate 16 req/s, batch column = rate"}, "came at a rate"),
        ({"notes": "fp8 KV cache"}, "the KV cache is fp8, but the precision is 'fp8'"),
        ({"engine": "ideal-graph TP2"}, "no figure is known"),
        ({"engine": "zyphra-vllm TP2"}, "no figure is known"),
        ({"engine": "gpt-fast TP2"}, "with batch 16"),
        ({"hardware": "2xMI300X", "engine": "trtllm TP2"}, "NVIDIA alone"),
        ({"engine": "vLLM ROCm TP2"}, "AMD alone"),
        ({"batch": "0"}, "the batch must be one number >= 1, but is '0'"),
        ({"batch": "-1"}, ">= 1, but is '-1'"),
        ({"context_or_shape": "random 1000/1000"}, "prompt and generated tokens are not both stated"),
        ({"hardware": "2xH100"}, "SXM, PCIe or NVL"),
        ({"dtype": "as in recipe (see URL)"}, "not stated for certain"),
        ({"dtype": "bf16 (precision blank in source)"}, "not stated for certain"),
        ({"dtype": "recipe default"}, "not stated for certain"),
        ({"dtype": ""}, "precision is not stated"),
        ({"dtype": "fp4"}, "does not say what weights"),  # nvfp4 or mxfp4, in vLLM
        ({"dtype": "mxfp4"}, "does not say what weights"),  # Llama was not published in it
        ({"dtype": "bf16 KV"}, "does not say what weights"),
        ({"batch": "max (trtllm-bench inflight, unstated)"}, "the batch must be one number"),
        ({"batch": "offline"}, "the batch must be one number"),
        ({"batch": ""}, "the batch is not stated"),
        ({"context_or_shape": ""}, "prompt and generated tokens"),
        ({"context_or_shape": "MLPerf"}, "prompt and generated tokens"),
        ({"model_or_op": "DeepSeek-R1"}, "model 'DeepSeek-R1' is not known"),
        ({"model_or_op": "Llama-3.1-70B EAGLE-3"}, "speculation"),
        ({"model_or_op": "Llama-3.1-70B distilled"}, "'distilled' changes"),
        ({"notes": "MTP speculative, accept length 3"}, "speculation"),
        ({"notes": "read from a draft copy of the post", "context_or_shape": ""}, "prompt and generated tokens"),
        ({"engine": "vllm 0.12.0"}, "how 2 devices share the model"),
        ({"engine": "vllm 0.12.0 TP4"}, "do not use 2 devices"),
        ({"engine": "vllm 0.12.0 TP1"}, "do not use 2 devices"),
        ({"engine": "vllm 0.12.0 TP2 EP2"}, "a model without experts"),
        ({"engine": "llama.cpp TP2"}, "no profile; known"),
        ({"engine": "vLLM (AITER off) TP2"}, "a variant"),
        ({"engine": ""}, "engine is not stated"),
        ({"metric": "decode_tokens_per_s", "unit": "tok/s"}, "of one sequence or of the whole batch"),
        ({"metric": "output_tokens_per_s_total", "unit": "tok/s/GPU"}, "must be in tok/s, but"),
        ({"metric": "output_tokens_per_s_per_gpu", "unit": "tok/s"}, "must be in tok/s/GPU, but"),
        ({"metric": "mean_tpot", "unit": "tok/s"}, "must be in ns, us, ms, s"),
        ({"metric": "throughput_tokens_per_s_as_printed", "unit": "tok/s"}, "which tokens"),
        ({"metric": "tokens_per_forward"}, "an acceptance is an input"),
        ({"metric": "itl_slope_b"}, "coefficient of a fit"),
    ],
)  # fmt: skip
def test_a_served_row_that_is_not_fully_stated_is_refused(changes: dict[str, str], reason: str) -> None:
    assert reason in str(found(SERVED, **changes))


def test_tokens_per_second_of_a_user_of_a_gpu_and_in_all() -> None:
    """20 ms a token; 16 sequences and 2 devices."""
    user = point(SERVED, metric="decode_tokens_per_s_per_user", unit="tok/s/user", value="50")
    assert user.measured_seconds == pytest.approx(0.02) and user.metric == "per_token"
    everyone = point(SERVED, metric="output_tokens_per_s_total", unit="tok/s", value="800")
    gpu = point(SERVED, metric="output_tokens_per_s_per_gpu", unit="tok/s/GPU", value="400")
    assert everyone.measured_seconds == pytest.approx(gpu.measured_seconds) == pytest.approx(1 / 800)
    assert everyone.metric == "total"


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("vLLM (ML.ENERGY v3) TP1 EP8", ("vllm", 1, 8)),
        ("trtllm 1.2.0rc2.post2 TP2", ("tensorrt-llm", 2, None)),
        ("TensorRT-LLM v1.0 TP1", ("tensorrt-llm", 1, None)),
        ("SGLang 0.5.13.post1 TP4EP4", ("sglang", 4, 4)),
        ("gpt-fast TP8", ("gpt-fast", 8, None)),
        ("ideal-graph", ("ideal-graph", None, None)),
        ("vLLM 0.11.0 V1 TP2", ("vllm", 2, None)),
        ("vLLM TP1 DP1", ("vllm", 1, None)),
    ],
)
def test_engines_by_their_published_names(text: str, parsed: tuple[str, int | None, int | None]) -> None:
    found = runtime(text)
    assert (found.engine, found.tensor, found.expert) == parsed


def test_four_bits_mean_what_the_checkpoint_or_the_engine_makes_of_them() -> None:
    oss, llama = load_spec("gpt-oss-120b"), load_spec("llama-3.1-70b")
    assert served_precision("fp4", oss, "vllm") == (oss.published_precision, False)
    assert served_precision("fp4", llama, "tensorrt-llm")[0].weights == "nvfp4"
    assert served_precision("bf16", llama, "vllm") == (uniform("bfloat16"), False)
    assert served_precision("fp8 weights + fp8 KV", llama, "vllm")[0].cache == "fp8"
    with pytest.raises(Unclear):
        served_precision("fp4", llama, "vllm")


def test_a_precision_is_read_in_either_case_and_with_its_cache() -> None:
    llama = load_spec("llama-3.1-70b")
    for label in ("bf16", "fp8", "nvfp4"):
        assert served_precision(label.upper(), llama, "vllm") == served_precision(label, llama, "vllm")
        assert served_precision(f"{label} + fp8 KV", llama, "vllm")[0].cache == "fp8"
    assert served_precision("bf16 + fp8 KV", llama, "vllm")[0].weights == "bfloat16"
    assert served_precision("fp8 + bf16 KV", llama, "vllm") == (quantised("fp8"), True)
    assert point(GEMM, dtype="BF16").call == point(GEMM).call
    assert point(ATTENTION, dtype="FP8 KV").call == point(ATTENTION).call
    assert point(ATTENTION, model_or_op="Paged Decode Attention").call == point(ATTENTION).call


@pytest.mark.parametrize("name", ["nvidia/Llama-3.1-70B-Instruct-FP8", "RedHatAI/Llama-3.1-70B-FP8"])
def test_a_model_of_another_publisher_is_the_same_model(name: str) -> None:
    assert point(SERVED, model_or_op=name).model == point(SERVED).model


def test_a_diffusion_model_that_decodes_one_token_at_a_time_is_predicted() -> None:
    assert point(SERVED, model_or_op="SDAR-8B AR", dtype="bf16").model.name == "sdar-8b"


def test_a_model_by_its_config(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert point(SERVED, model_or_op=str(path)).model.hidden_size == 64
    assert point(SERVED, model_or_op=f"{tmp_path}/").model.hidden_size == 64
    assert "unknown model" in str(found(SERVED, model_or_op=str(tmp_path / "none.json")))


def test_a_tidar_throughput() -> None:
    found = point(TIDAR, note="thinking on, EOS allowed, 8 jobs on one host")
    assert isinstance(found, TidarThroughputPoint)
    assert (found.decoding.sampler, found.decoding.draft_tokens, found.acceptance_length) == ("two_forward", 16, 6.5)
    assert (found.ends_early, found.refilled, found.thinking, found.build) == (True, False, True, "0bfa5c58")
    assert found.measured_seconds == pytest.approx(1 / 900)


def test_a_note_says_what_an_acceptance_counts_and_whether_slots_were_refilled() -> None:
    assert point(TIDAR, note="acceptance excludes the +1 token").acceptance_length == 7.5
    assert point(TIDAR, note="n_sample=10, includes refill").refilled
    assert not point(TIDAR, note="n_sample=1, no refill").refilled


def test_rows_of_one_run_can_be_compared() -> None:
    names = ("mt5k-greedy-h100-ar-b8", "mt5k-greedy-h100-tf-b8", "mt5k-greedy-mi300x-tf-b64")
    assert {point(TIDAR, id=name).prefix for name in names} == {"mt5k-greedy"}
    assert point(TIDAR, id="mt4k-t06-h100-tf-b8").prefix == "mt4k-t06"


def test_the_series_of_a_tidar_row_is_its_run_mode_and_device() -> None:
    series = {point(TIDAR, id=f"mt5k-greedy-h100-tf-b{b}", batch=str(b)).series for b in (1, 8, 64)}
    assert len(series) == 1
    assert point(TIDAR, hardware="MI300X").series not in series
    assert point(TIDAR, mode="autoregressive", draft_tokens="").series not in series


def test_a_tidar_forward_is_of_the_kind_that_its_note_says() -> None:
    assert isinstance(point(FORWARD), TidarForwardPoint)
    assert point(FORWARD).part == "verify"
    assert point(FORWARD, note="draft forward, 8x17 tokens, captured graph").part == "draft"
    assert point(FORWARD, metric="sampler_ms", note="rejection sampler").part == "sampler"


@pytest.mark.parametrize(
    ("cells", "changes", "reason"),
    [
        (TIDAR, {"hardware": "H100"}, "SXM, PCIe or NVL"),
        (TIDAR, {"hardware": "8xMI300X"}, "runs on one device"),
        (TIDAR, {"mode": "speculative"}, "mode must be"),
        (TIDAR, {"mean_acceptance_length": ""}, "acceptance length is not stated"),
        (TIDAR, {"mean_acceptance_length": "18"}, "1 to K + 1"),
        (TIDAR, {"draft_tokens": ""}, "draft_tokens is not stated"),
        (TIDAR, {"batch": "1-4"}, "the batch must be one whole number"),
        (TIDAR, {"generated_tokens": ""}, "generated_tokens is not stated"),
        (TIDAR, {"temperature": ""}, "temperature must be a number"),
        (TIDAR, {"mode": "single_forward"}, "proposal_levels must be numbers"),
        (TIDAR, {"mode": "single_forward", "proposal_levels": "1 2"}, "ascend from 0"),
        (TIDAR, {"metric": "speedup"}, "metric 'speedup' is not modelled"),
        (TIDAR, {"note": "AITER default MoE kernels, paired ABBA"}, "other kernels"),
        (TIDAR, {"note": "eager, no CUDA graphs"}, "what 'eager' in the note changes"),
        (TIDAR, {"note": "TP2"}, "'TP2'"),
        (TIDAR, {"note": "K=16, mixing weight 0.5"}, "'mixing weight'"),
        (TIDAR, {"note": "ZAYA1-74B-preview"}, "'74B'"),
        (TIDAR, {"note": "median of per-user rates"}, "'per-user'"),
        (TIDAR, {"mean_acceptance_length": "16.5", "note": "acceptance excludes the +1 token"}, "but is 17.5"),
        (TIDAR, {"batch": "0"}, ">= 1, but is '0'"),
        (FORWARD, {"note": ""}, "which forward"),
        (FORWARD, {"note": "verify forward, 16x17 tokens"}, "but the batch is 8 of 17 slots"),
    ],
)  # fmt: skip
def test_a_tidar_row_that_is_not_fully_stated_is_refused(
    cells: dict[str, str], changes: dict[str, str], reason: str
) -> None:
    assert reason in str(found(cells, **changes))


def test_kernel_points_know_their_series() -> None:
    first, second = point(GEMM), point(GEMM, context_or_shape="M=16,N=64,K=64")
    assert isinstance(first, KernelPoint) and first.series == second.series
    for column, text in (("hardware", "H200 SXM"), ("dtype", "fp8"), ("engine", "torch"), ("model_or_op", "GEMM")):
        assert point(GEMM, **{column: text}).series != first.series
