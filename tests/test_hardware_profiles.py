"""The bundled devices are physically possible and comparable, and a user's own device stands beside them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

import ridgepoint
from hardware.files import UserError, build, read_yaml, write_atomic
from hardware.profile import HardwareProfile, Interconnect, list_profiles, load_profile

BUNDLED = {path.stem for path in (Path(__file__).parents[1] / "hardware" / "profiles").glob("*.yaml")}
PROFILES = {name: load_profile(str(list_profiles()[name])) for name in sorted(BUNDLED)}
CELLS = [(name, path) for name, profile in PROFILES.items() for path in profile.figures()]

# Dense 16-bit FLOPs per clock and unit with float32 accumulation: the vendors' architecture papers.
PER_CLOCK = {"sm_80": 2048, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "gfx942": 2048, "gfx950": 4096}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of the user's own profiles."""
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hardware"


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert ridgepoint.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def device(**changed: Any) -> str:
    """A new device's YAML: the H200 with other figures."""
    return yaml.safe_dump(read_yaml(list_profiles()["h200"]) | {"name": "mine"} | changed)


def test_the_ten_devices_are_there_under_their_own_names() -> None:
    wanted = "mi300x mi325x mi355x h100-sxm h100-pcie h200 b200 a100-80gb-sxm l40s rtx-4090"
    assert set(PROFILES) >= set(wanted.split())
    assert all(profile.name == name for name, profile in PROFILES.items())


@pytest.mark.parametrize(("name", "path"), CELLS)
def test_every_figure_has_a_source_that_can_be_followed(name: str, path: str) -> None:
    source = PROFILES[name].source(path)
    assert re.search(r"https://\S+\.\S+", source)
    assert source.startswith(("https://", "derived: "))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_peaks_are_dense_and_fit_the_units_and_the_clock(profile: HardwareProfile) -> None:
    peak = {str(dtype): rate for dtype, rate in profile.peak_flops_per_second.items()}
    assert peak["bfloat16"] == peak["float16"]
    assert profile.clock_hertz is not None
    # GeForce boards accumulate in float32 at half the rate. A sparse figure would be twice as high; vendors state some
    # peaks at a lower clock than the device reaches.
    expected = PER_CLOCK[profile.compile_target] / (2 if profile.name.startswith("rtx-4090") else 1)
    per_clock = peak["bfloat16"] / profile.compute_units / profile.clock_hertz
    assert 0.9 * expected < per_clock < 1.01 * expected
    if "fp8" in peak:
        assert peak["fp8"] == pytest.approx(2 * peak["bfloat16"], rel=0.02)
    if "fp4" in peak:
        assert peak["fp4"] == pytest.approx(2 * peak["fp8"], rel=0.02)
    full_rate = 4 if profile.name == "rtx-4090" else 2  # integers accumulate at the full rate there
    assert peak["int8"] == pytest.approx(full_rate * peak["bfloat16"], rel=0.02)
    assert ("fp4" in peak) == (profile.compile_target in ("sm_100", "gfx950"))
    assert ("fp8" in peak) == (profile.compile_target != "sm_80")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_achieved_figures_exist_for_every_dtype_and_level_and_are_plausible(profile: HardwareProfile) -> None:
    assert set(profile.achieved_flops_per_second) == set(profile.peak_flops_per_second)
    for dtype, rate in profile.achieved_flops_per_second.items():
        assert 0.45 * profile.peak_flops_per_second[dtype] < rate <= profile.peak_flops_per_second[dtype]
    main = profile.main_memory
    assert main.peak_bandwidth_bytes_per_second and main.achieved_bandwidth_bytes_per_second
    assert 0.7 < main.achieved_bandwidth_bytes_per_second / main.peak_bandwidth_bytes_per_second < 1
    assert 5e11 < main.peak_bandwidth_bytes_per_second < 1e13  # TB/s are written out in bytes
    achieved = [level.achieved_bandwidth_bytes_per_second or 0 for level in profile.memory]
    assert achieved == sorted(achieved, reverse=True) and all(achieved)
    peaks = [level.peak_bandwidth_bytes_per_second for level in profile.memory]
    known = [peak for peak in peaks if peak]
    assert known == sorted(known, reverse=True)
    assert 100 < profile.peak_flops_per_second["bfloat16"] / main.peak_bandwidth_bytes_per_second < 500  # ridge point


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_no_published_rate_passes_a_peak(profile: HardwareProfile) -> None:
    """Of the best matmuls that others measured on the device, but for those that are listed with their reason."""
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "fp8", "int8": "int8"}
    published = Path(__file__).parents[1] / "measurements" / "published"
    with (published / "exceptions.csv").open(encoding="utf-8", newline="") as stream:
        excepted = {row["id"] for row in csv.DictReader(stream)}
    with (published / "gpu_measured.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["kind"] == "A" and row["unit"] == "TFLOPS"]
    of_device = {"a100-80gb-sxm": "A100 SXM 80GB", "h100-pcie": "H100 PCIe"} | {
        name: f"{name.split('-')[0].upper()} SXM" for name in ("b200", "h100-sxm", "h200")
    }
    device = of_device.get(profile.name, profile.name.replace("-", " ").upper())
    measured = [row for row in rows if row["hardware"] == device and "peak" not in row["metric"]]
    measured = [row for row in measured if row["dtype"] in names]
    assert measured
    peaks = {str(dtype): rate for dtype, rate in profile.peak_flops_per_second.items()}
    for row in measured:
        passes = float(row["value"]) * 1e12 > peaks[names[row["dtype"]]]
        assert passes == (row["id"] in excepted), row["id"]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_what_a_driver_reports_is_near_the_capacity(profile: HardwareProfile) -> None:
    """Vendors' decimal gigabytes are binary ones less a reserve, and less a sixteenth for ECC of GDDR."""
    assert 0.99 * profile.main_memory.capacity_bytes < profile.usable_memory_bytes
    assert profile.usable_memory_bytes < 1.075 * profile.main_memory.capacity_bytes
    assert profile.memory[0].capacity_bytes % (1 << 19) == 0  # caches are binary on every device


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_host_costs_links_power_and_price_are_plausible(profile: HardwareProfile) -> None:
    assert 5e-7 < profile.graph_node_seconds <= profile.launch_seconds < 1e-5
    link = profile.interconnect
    assert link is not None and link.devices == 8 and link.latency_seconds and link.achieved_bandwidth_bytes_per_second
    assert 0.5 < link.achieved_bandwidth_bytes_per_second / link.peak_bandwidth_bytes_per_second < 1.1
    if profile.vendor == "AMD":  # a full mesh: one link to each of the seven others
        assert link.pair_bandwidth_bytes_per_second == pytest.approx(link.peak_bandwidth_bytes_per_second / 7)
    assert profile.tdp_watts and 300 <= profile.tdp_watts <= 1500
    assert profile.price_dollars_per_hour and 0.1 < profile.price_dollars_per_hour < 12


def test_devices_that_share_a_die_agree() -> None:
    """What differs between them is memory, power and clock; a slip in one of them would show."""
    for one, other in (("h100-sxm", "h200"), ("mi300x", "mi325x")):
        a, b = PROFILES[one], PROFILES[other]
        assert a.peak_flops_per_second == b.peak_flops_per_second
        assert (a.compute_units, a.shared_memory_bytes, a.clock_hertz) == (
            b.compute_units,
            b.shared_memory_bytes,
            b.clock_hertz,
        )
        assert a.memory[:-1] == b.memory[:-1]
        assert (a.launch_seconds, a.graph_node_seconds) == (b.launch_seconds, b.graph_node_seconds)
        assert b.main_memory.capacity_bytes > a.main_memory.capacity_bytes
    assert PROFILES["h100-pcie"].memory[0].capacity_bytes == PROFILES["h100-sxm"].memory[0].capacity_bytes
    assert PROFILES["l40s"].shared_memory_bytes == PROFILES["rtx-4090"].shared_memory_bytes


@given(
    st.sampled_from([cell for cell in CELLS if cell[1].startswith(("interconnect", "memory", "clock"))]),
    st.one_of(st.floats(max_value=0), st.sampled_from([float("nan"), float("inf"), "fast", True, None])),
)
def test_no_figure_of_any_device_may_be_impossible(cell: tuple[str, str], wrong: Any) -> None:
    name, path = cell
    assume(wrong is not None or not path.endswith("pair_bandwidth_bytes_per_second"))  # optional, its source is shared
    changed = read_yaml(list_profiles()[name])
    holder: Any = changed
    *parts, last = path.split(".")
    for part in parts:
        holder = next(x for x in holder if x["name"] == part) if isinstance(holder, list) else holder[part]
    holder[last] = wrong
    with pytest.raises(UserError):  # None: the figure is gone, and its source is one of nothing or it was required
        build(HardwareProfile, changed, "some.yaml")


@given(st.floats(1e9, 1e12), st.floats(1.001, 100))
def test_links_cannot_be_faster_than_their_peak(peak: float, factor: float) -> None:
    with pytest.raises(UserError, match="pair <= peak"):
        Interconnect("x", 8, peak, pair_bandwidth_bytes_per_second=peak * factor)
    with pytest.raises(UserError, match="achieved <= 2"):
        Interconnect("x", 8, peak, achieved_bandwidth_bytes_per_second=2 * peak * factor)
    with pytest.raises(UserError, match="devices >= 2 must hold, but got 1"):
        Interconnect("x", 1, peak)


def test_links_need_sources_and_known_keys() -> None:
    changed = read_yaml(list_profiles()["h200"])
    del changed["sources"]["interconnect"]
    with pytest.raises(UserError, match=r"interconnect\.devices has none"):
        build(HardwareProfile, changed, "some.yaml")
    changed = read_yaml(list_profiles()["h200"])
    changed["interconnect"]["bandwidth"] = 1.0
    with pytest.raises(UserError, match="unknown key 'bandwidth'"):
        build(HardwareProfile, changed, "some.yaml")


def test_a_new_device_is_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the user's folder it is listed, shown, compared and predicted for, like a bundled one."""
    path = write_atomic(folder / "mine.yaml", device(tdp_watts=600.0))
    listed = document(capsys, "hardware", "list")
    assert listed["mine"]["origin"] == "user" and listed["mine"]["path"] == str(path)
    assert listed["h200"]["origin"] == "bundled"
    assert listed["mine"]["ridge_flops_per_byte"] == pytest.approx(989e12 / 4.8e12)
    assert document(capsys, "hardware", "show", "mine")["tdp_watts"] == 600
    assert document(capsys, "hardware", "validate", "mine")["valid"] is True
    figures = document(capsys, "hardware", "compare")["figures"]
    assert figures["tdp_watts"]["mine"] == 600 and figures["tdp_watts"]["h200"] == 700
    predict = "predict --model zaya1-8b --batch 4 --context 1024 --sampler autoregressive --hardware"
    mine, same = (document(capsys, *predict.split(), name) for name in ("mine", "h200"))
    assert mine["bound_step_seconds"] == same["bound_step_seconds"] <= mine["step_seconds"]


def test_a_device_of_another_speed_is_predicted_with_its_own_figures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = read_yaml(list_profiles()["h200"])["memory"]
    memory[-1] |= {"peak_bandwidth_bytes_per_second": 2.4e12, "achieved_bandwidth_bytes_per_second": 2.24e12}
    write_atomic(folder / "mine.yaml", device(memory=memory))
    predict = "predict --model zaya1-8b --batch 64 --context 8192 --sampler autoregressive --hardware"
    mine, faster = (document(capsys, *predict.split(), name) for name in ("mine", "h200"))
    assert mine["bound_step_seconds"] > 1.5 * faster["bound_step_seconds"]


def test_a_file_elsewhere_works_in_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_atomic(tmp_path / "elsewhere.yaml", device(name="h200")))
    assert document(capsys, "hardware", "show", path)["name"] == "h200"
    assert document(capsys, "hardware", "validate", path)["valid"] is True
    # It goes by its own name, or by the path where the two would be confused.
    assert document(capsys, "hardware", "compare", path)["devices"] == ["h200"]
    assert document(capsys, "hardware", "compare", "h200", path)["devices"] == ["h200", path]
    arguments = f"predict --model zaya1-8b --batch 1 --context 64 --hardware {path} --sampler autoregressive"
    assert document(capsys, *arguments.split())["step_seconds"] > 0


def test_a_broken_file_is_named_and_the_others_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_atomic(folder / "broken.yaml", "name: [unclosed")
    write_atomic(folder / "slow.yaml", device(name="slow", launch_seconds=-1.0))
    for command in ("list", "compare"):
        assert ridgepoint.main(["hardware", command, "--json"]) == 0
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert len(lines) == 2 and str(folder / "broken.yaml") in lines[0] and "launch_seconds > 0" in lines[1]
        shown = json.loads(out)
        assert set(shown if command == "list" else shown["devices"]) == BUNDLED
    for command in ("show", "validate", "compare"):  # asked for by name it is an error
        assert ridgepoint.main(["hardware", command, "broken"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_devices_are_compared_figure_by_figure(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "hardware", "compare", "l40s", "mi355x")
    assert found["devices"] == ["l40s", "mi355x"]
    figures = found["figures"]
    assert figures["memory.main.capacity_bytes"] == {"l40s": 48e9, "mi355x": 288e9}  # GDDR and HBM
    assert figures["peak_flops_per_second.fp4"] == {"l40s": None, "mi355x": 10066.3e12}
    for name, profile in (("l40s", PROFILES["l40s"]), ("mi355x", PROFILES["mi355x"])):
        assert sum(values[name] is not None for values in figures.values()) == len(profile.figures())


def test_figures_are_compared_in_the_order_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    """Caches from the fastest on, then main memory, whichever device is named first."""
    for names in (("mi300x", "h200", "l40s"), ("l40s", "h200", "mi300x")):
        figures = list(document(capsys, "hardware", "compare", *names)["figures"])
        levels = [name.split(".")[1] for name in figures if name.startswith("memory.")]
        assert list(dict.fromkeys(levels)) == ["l2", "infinity_cache", "main"]
        dtypes = [name.split(".")[1] for name in figures if name.startswith("peak_flops")]
        assert dtypes == ["float32", "bfloat16", "float16", "fp8", "int8"]
        groups = list(dict.fromkeys(name.split(".")[0] for name in figures))
        assert groups.index("clock_hertz") < groups.index("memory") < groups.index("interconnect")
        assert groups[-2:] == ["tdp_watts", "price_dollars_per_hour"]
        assert sum(name.startswith("memory.l2.") for name in figures) == 3


def test_a_file_under_another_name_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_atomic(folder / "mygpu.yaml", device(name="h200"))
    assert ridgepoint.main(["hardware", "list", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "'mygpu', but is 'h200'" in err and set(json.loads(out)) == BUNDLED
    assert ridgepoint.main(["predict", "--model", "zaya1-8b", "--hardware", "mygpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("columns", [60, 100, 400])
def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert ridgepoint.main(["hardware", "compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= max(columns, 75)  # a name of a figure and one device are the least
    assert sum(line.startswith("tdp_watts") for line in lines) == sum(not line.strip() for line in lines)
    heads = [word for line in lines if line.startswith(" ") for word in line.split()]
    assert heads == sorted(BUNDLED)
    assert ridgepoint.main(["hardware", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 1 + len(BUNDLED) and all(line.endswith("bundled") for line in listed[1:])
