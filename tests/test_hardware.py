"""Profiles are strict and sourced, a probe's profile is one of them, and fingerprints say when times compare."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import hardware.cli
import hardware.probe
from hardware.files import UserError, build, plain, read_yaml, write_atomic
from hardware.fingerprint import cpu_model, fingerprint, fingerprint_key, git_commit
from hardware.profile import HardwareProfile, list_profiles, load_profile, save_profile

EXAMPLES = ("h100-sxm", "mi300x")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the user's own profiles."""
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def data(name: str = "mi300x") -> dict[str, Any]:
    return read_yaml(list_profiles()[name])


def rejected(changed: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        build(HardwareProfile, changed, "some.yaml")
    message = str(error.value)
    assert message.startswith("some.yaml") and "\n" not in message
    return message


def place(changed: dict[str, Any], path: str) -> tuple[Any, Any]:
    """The container and the key of a dotted path; levels of memory are found by name."""
    *parts, last = path.split(".")
    holder: Any = changed
    for part in parts:
        holder = next(x for x in holder if x["name"] == part) if isinstance(holder, list) else holder[part]
    return holder, last


def figures() -> list[tuple[str, str]]:
    return [(name, path) for name in EXAMPLES for path in load_profile(name).figures()]


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "path"), figures())
def test_no_figure_may_be_zero_negative_or_unbounded(name: str, path: str, wrong: float) -> None:
    changed = data(name)
    holder, key = place(changed, path)
    holder[key] = wrong
    assert key in rejected(changed)


@pytest.mark.parametrize(("name", "path"), figures())
def test_no_figure_may_be_a_word_or_go_without_a_source(name: str, path: str) -> None:
    changed = data(name)
    holder, key = place(changed, path)
    holder[key] = "fast"
    assert f"{key}" in rejected(changed) and "'fast'" in rejected(changed)

    changed = data(name)
    parts = path.split(".")
    for n in range(len(parts)):
        changed["sources"].pop(".".join(parts[: n + 1]), None)
    assert "has none" in rejected(changed)


REQUIRED = [
    f.name
    for f in dataclasses.fields(HardwareProfile)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
]


@pytest.mark.parametrize("key", REQUIRED)
def test_required_keys_are_named_when_missing(key: str) -> None:
    changed = data()
    del changed[key]
    assert f"missing key '{key}'" in rejected(changed)


def test_unknown_keys_are_named_wherever_they_are() -> None:
    assert "unknown key 'peak_flops'" in rejected(data() | {"peak_flops": 1.0})
    changed = data()
    changed["memory"][1]["bandwidth"] = 1.0
    message = rejected(changed)
    assert "memory[1]" in message and "unknown key 'bandwidth'" in message
    changed = data()
    changed["peak_flops_per_second"]["bf16"] = 1.0
    message = rejected(changed)
    assert "'bf16'" in message and "bfloat16" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "tpu"}, ["kind", "gpu, cpu", "'tpu'"]),
        ({"name": "two words"}, ["name", "'two words'"]),
        ({"name": "../up"}, ["name", "'../up'"]),
        ({"memory": []}, ["memory", "at least one"]),
        ({"peak_flops_per_second": {}, "achieved_flops_per_second": {}}, ["peak_flops_per_second", "at least one"]),
        ({"achieved_flops_per_second": {"bfloat16": 1308e12}}, ["achieved_flops_per_second.bfloat16", "1308"]),
        ({"warp_size": 64.5}, ["warp_size", "64.5"]),
        ({"vendor": ""}, ["vendor must be words", "''"]),
        ({"compile_target": " "}, ["compile_target must be words"]),
        ({"compute_units": 10**30}, ["compute_units", "2**63"]),
        ({"compute_units": 10**15}, ["compute_units <= 100000 must hold, but got 1000000000000000"]),
        ({"tdp_watts": 10**400}, ["tdp_watts", "2**63"]),
        ({"tdp_watts": 1e6}, ["tdp_watts <= 100000 must hold", "1000000"]),
        ({"price_dollars_per_hour": 1e6}, ["price_dollars_per_hour <= 10000 must hold"]),
        ({"clock_hertz": 2.1e18}, ["clock_hertz <= 1e+11 must hold"]),
        ({"launch_seconds": 2.1}, ["launch_seconds <= 1 must hold, but got 2.1"]),
        ({"shared_memory_bytes": 10**15}, ["shared_memory_bytes <= 1e+14 must hold"]),
        ({"peak_flops_per_second": {"bfloat16": 1e21}}, ["peak_flops_per_second.bfloat16 <= 1e+18 must hold"]),
        ({"compute_units": True}, ["compute_units", "True"]),
    ],
)
def test_impossible_values_are_named(change: dict[str, Any], words: list[str]) -> None:
    message = rejected(data() | change)
    for word in words:
        assert word in message


def test_levels_must_be_ordered_unique_and_below_their_peak() -> None:
    changed = data()
    changed["memory"].reverse()
    assert "ordered" in rejected(changed)
    changed = data()
    changed["memory"][0]["name"] = "hbm"
    assert "twice" in rejected(changed)
    changed = data()
    changed["memory"][2]["achieved_bandwidth_bytes_per_second"] = 5.4e12
    assert "achieved <= peak" in rejected(changed)
    changed = data()
    del changed["memory"][2]["peak_bandwidth_bytes_per_second"]
    assert "memory.hbm" in rejected(changed)


@pytest.mark.parametrize(
    ("level", "key", "value", "words"),
    [
        (0, "capacity_bytes", 1e20, "capacity_bytes <= 1e+14 must hold"),
        (2, "peak_bandwidth_bytes_per_second", 5.3e18, "peak_bandwidth_bytes_per_second <= 1e+15 must hold"),
        (2, "reported_bytes", -1.0, "reported_bytes > 0 must hold"),
        (1, "name", "", "name must be one word"),
    ],
)
def test_levels_have_names_and_plausible_figures(level: int, key: str, value: Any, words: str) -> None:
    changed = data()
    changed["memory"][level][key] = value
    message = rejected(changed)
    assert f"memory[{level}]" in message and words in message


def test_links_have_names() -> None:
    changed = data()
    changed["interconnect"]["name"] = ""
    assert "interconnect: name must be words, but is ''" in rejected(changed)


def test_memory_is_what_the_driver_reports_where_that_is_known() -> None:
    changed = data()
    changed["memory"][2] |= {"capacity_bytes": 192e9}
    changed["memory"][2].pop("reported_bytes", None)
    changed["sources"].pop("memory.hbm.reported_bytes", None)
    assert build(HardwareProfile, changed, "some.yaml").usable_memory_bytes == 192e9
    changed["memory"][2] |= {"reported_bytes": 206e9}
    assert "memory.hbm.reported_bytes has none" in rejected(changed)
    changed["sources"]["memory.hbm.reported_bytes"] = "https://example.org"
    assert build(HardwareProfile, changed, "some.yaml").usable_memory_bytes == 206e9


def test_a_source_of_nothing_or_without_text_is_an_error() -> None:
    changed = data()
    changed["sources"]["memory.l3"] = "https://example.org"
    assert "memory.l3" in rejected(changed)
    changed = data()
    changed["sources"]["tdp_watts"] = " "
    assert "tdp_watts" in rejected(changed)


def test_an_unknown_name_lists_the_known_ones(home: Path) -> None:
    write_atomic(home / "hardware" / "mine.yaml", yaml.safe_dump(data() | {"name": "mine"}))
    with pytest.raises(UserError, match=r"unknown hardware 'abacus'; known: .*h100-sxm.* mine"):
        load_profile("abacus")


def test_the_users_profile_wins_over_a_bundled_one(home: Path) -> None:
    write_atomic(home / "hardware" / "mi300x.yaml", yaml.safe_dump(data() | {"tdp_watts": 600.0}))
    assert load_profile("mi300x").tdp_watts == 600
    assert load_profile("h100-sxm").tdp_watts == 700


def test_a_known_profile_has_the_name_of_its_file(home: Path) -> None:
    """Else what is known of one device, such as an engine's costs there, would be taken for the other's."""
    path = write_atomic(home / "hardware" / "mygpu.yaml", yaml.safe_dump(data()))
    with pytest.raises(UserError, match=r"mygpu\.yaml: name must be the file's, 'mygpu', but is 'mi300x'"):
        load_profile("mygpu")
    assert load_profile(path).name == "mi300x"  # asked for by path, it goes by its own name


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_saved_profile_reads_back_equal(tmp_path: Path, name: str) -> None:
    profile = dataclasses.replace(load_profile(name), vendor="Zo\u00eb: 'x'\u0085\n")
    assert load_profile(save_profile(profile, tmp_path / "copy.yml")) == profile


def test_a_path_is_read_directly_and_named_in_the_error(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "bad.yaml", yaml.safe_dump(data() | {"launch_seconds": -1}))
    with pytest.raises(UserError, match=r"launch_seconds > 0 must hold, but got -1") as error:
        load_profile(str(path))
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        load_profile(tmp_path / "absent.yaml")


@pytest.fixture(scope="module")
def tiny_grid() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        grid = hardware.probe._Grid((1, 64), ((128, 128),), ((4, 128, 64),), (512, 4096), 0.3)
        patch.setitem(hardware.probe._GRIDS, ("cpu", True), grid)
        yield


@pytest.fixture(scope="module")
def probed(tiny_grid: None) -> tuple[HardwareProfile, list[tuple[str, float]], tuple[int, int]]:
    """One small probe, what it reported on its way, and torch's threads before and after."""
    import torch

    reports: list[tuple[str, float]] = []
    before = torch.get_num_threads()
    profile = hardware.probe.probe(quick=True, threads=1, progress=lambda label, done: reports.append((label, done)))
    return profile, reports, (before, torch.get_num_threads())


def test_a_probe_is_a_profile_that_is_written_and_read_back(probed: Any, tmp_path: Path) -> None:
    profile = probed[0]
    assert load_profile(save_profile(profile, tmp_path / "probe.yaml")) == profile
    assert profile.kind == "cpu" and profile.name == hardware.probe.local_name("cpu")
    assert profile.fingerprint == fingerprint(cpu_model())
    assert all(profile.source(path).startswith(("measured: ", "derived: ")) for path in profile.figures())
    assert "ridgepoint hardware probe --device cpu --quick --threads 1" in profile.source("launch_seconds")


def test_a_probe_measured_what_it_was_asked_to(probed: Any) -> None:
    profile = probed[0]
    (curves,) = profile.measured
    assert curves.threads == 1 and profile.curves() is profile.curves(1) is curves
    points = {(p.dtype, p.batch, p.m, p.k, p.n) for p in curves.matmul}
    for dtype in ("float32", "bfloat16"):
        assert (dtype, 1, 64, 128, 128) in points and (dtype, 4, 64, 128, 64) in points
        assert (dtype, 1, 1, 512, 4096) in points and (dtype, 1, 64, 512, 4096) not in points
    sizes = [p.working_set_bytes for p in curves.bandwidth]
    assert sizes == sorted(sizes) and sizes[0] == 64 << 10 and sizes[-1] >= 64 << 20


def test_a_probes_figures_agree_with_each_other(probed: Any) -> None:
    profile = probed[0]
    (curves,) = profile.measured
    times = {(p.dtype, p.batch, p.k, p.m): p.seconds for p in curves.matmul}
    for dtype in ("float32", "bfloat16"):
        assert times[dtype, 1, 128, 64] > times[dtype, 1, 128, 1]  # more work takes longer
        rates = [p.flops_per_second for p in curves.matmul if p.dtype == dtype]
        assert max(rates) <= profile.peak_flops_per_second[dtype] * 1.001
        assert max(rates) == pytest.approx(profile.achieved_flops_per_second[dtype], rel=1e-3)
    fastest = max(level.peak_bandwidth_bytes_per_second or 0 for level in profile.memory)
    assert max(p.bytes_per_second for p in curves.bandwidth) <= fastest * 1.001
    assert curves.python_seconds > 1e-8 and 1e-8 < curves.elementwise_seconds < curves.linear_seconds * 5


def test_a_probe_reports_its_progress_and_leaves_the_threads_alone(probed: Any) -> None:
    _, reports, (before, after) = probed
    shares = [done for _, done in reports]
    # A busy machine gets no second walk, so half of the way may be where it ends.
    assert shares == sorted(shares) and shares[0] == 0 and 0.4 < shares[-1] < 1
    assert before == after


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "tpu"}, "unknown device 'tpu'; known: cpu, cuda"),
        ({"threads": 0}, "threads >= 1 must hold, but got 0"),
    ],
)
def test_an_impossible_probe_is_one_line(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        hardware.probe.probe(**arguments)


def test_a_probe_of_an_absent_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees none"):
        hardware.probe.probe("cuda")


def test_curves_are_asked_for_by_thread_count(probed: Any) -> None:
    with pytest.raises(UserError, match="unknown thread count '3'; known: 1"):
        probed[0].curves(3)
    with pytest.raises(UserError, match="hardware probe"):
        load_profile("mi300x").curves()


def test_two_curves_of_one_thread_count_are_an_error(probed: Any) -> None:
    changed = plain(probed[0])
    changed["measured"] *= 2
    assert "thread count" in rejected(changed)


@pytest.mark.parametrize("path", ["seconds", "m", "working_set_bytes"])
def test_curves_are_as_strict_as_the_rest(probed: Any, path: str) -> None:
    changed = copy.deepcopy(plain(probed[0]))
    changed["measured"][0]["matmul"][3][path] = -1
    message = rejected(changed)
    assert "measured[0]: matmul[3]" in message and path in message


def test_caches_are_summed_over_the_cores_that_own_them(tmp_path: Path) -> None:
    for core, (shared, l1) in {"cpu0": ("0", "32K"), "cpu1": ("1", "48K")}.items():
        levels = [("1", "Data", l1, shared), ("1", "Instruction", "32K", shared), ("3", "Unified", "16M", "0-1")]
        for index, values in enumerate(levels):
            for name, text in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
                write_atomic(tmp_path / core / "cache" / f"index{index}" / name, text + "\n")
    assert hardware.probe._cpu_caches(tmp_path) == [(1, 80 << 10), (3, 16 << 20)]
    assert hardware.probe._cpu_caches(tmp_path / "absent") == []


def test_the_fingerprint_names_the_versions_that_are_installed() -> None:
    import numpy
    import torch

    found = fingerprint()
    assert (found["numpy"], found["torch"]) == (numpy.__version__, torch.__version__)
    assert found["cores"] >= 1 and found["memory_bytes"] > 1 << 28
    assert fingerprint("Some GPU")["device"] == "Some GPU"
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("key", "matters"), [("device", True), ("torch", True), ("cores", True), ("system", False)])
def test_the_key_changes_with_what_decides_timings(key: str, matters: bool) -> None:
    found = fingerprint()
    assert (fingerprint_key(found | {key: "other"}) != fingerprint_key(found)) is matters
    assert fingerprint_key(dict(reversed(found.items()))) == fingerprint_key(found)


def test_the_commit_says_when_tracked_files_were_changed(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == git_commit(tmp_path / "absent") == "unknown"
    file = write_atomic(tmp_path / "file", "1")

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    write_atomic(tmp_path / "untracked", "1")
    assert git_commit(tmp_path) == git_commit(file) == head
    write_atomic(file, "2")
    assert git_commit(tmp_path) == f"{head}-dirty"


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    hardware.cli.register(app)
    return CliRunner().invoke(app, ["hardware", *arguments])


def document(*arguments: str) -> Any:
    result = command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands_print_one_json_document() -> None:
    assert {name: s["path"] for name, s in document("list").items()} == {n: str(p) for n, p in list_profiles().items()}
    assert document("show", "mi300x") == plain(load_profile("mi300x"))
    assert document("validate", "h100-sxm")["valid"] is True


def test_commands_print_every_figure_for_people() -> None:
    shown = command("show", "h100-sxm").stdout
    assert all(path in shown for path in load_profile("h100-sxm").figures())
    assert "mi300x" in command("list").stdout
    assert "valid" in command("validate", str(list_profiles()["mi300x"])).stdout


def test_the_probe_command_writes_a_profile_that_is_then_known(tiny_grid: None, home: Path) -> None:
    found = document("probe", "--quick", "--threads", "1")
    name = hardware.probe.local_name("cpu")
    assert found["path"] == str(home / "hardware" / f"{name}.yaml")
    assert plain(load_profile(name)) == found["profile"]


def test_probes_of_different_processors_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for model, cores in (("AMD EPYC 9B14", 2), ("AMD EPYC 9B14", 4), ("Intel(R) Xeon(R) @ 2.20GHz", 2)):
        monkeypatch.setattr(hardware.probe, "cpu_model", lambda model=model: model)
        monkeypatch.setattr(hardware.probe, "core_count", lambda cores=cores: cores)
        names.add(hardware.probe.local_name("cpu"))
    assert names == {
        "local-amd-epyc-9b14-2-cores",
        "local-amd-epyc-9b14-4-cores",
        "local-intel-r-xeon-r-2-20ghz-2-cores",
    }


def test_a_probe_is_called_as_asked(tiny_grid: None, home: Path) -> None:
    assert document("probe", "--quick", "--threads", "1", "--name", "desk")["profile"]["name"] == "desk"
    assert load_profile("desk").name == "desk"
    for name in ("two words", "../up"):
        assert "one word" in str(command("probe", "--name", name).exception)


@pytest.mark.parametrize(("out", "words"), [("probe.json", "must end in .yaml"), ("file/probe.yaml", "cannot write")])
def test_the_probe_command_refuses_a_bad_file_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str
) -> None:
    def unwanted(*_: Any, **__: Any) -> None:
        raise AssertionError("it measured first")

    monkeypatch.setattr(hardware.probe, "probe", unwanted)
    write_atomic(tmp_path / "file", "not a folder")
    error = command("probe", "--out", str(tmp_path / out)).exception
    assert isinstance(error, UserError) and words in str(error)
    other = command("probe", "--name", "desk", "--out", str(tmp_path / "home" / "hardware" / "mine.yaml")).exception
    assert isinstance(other, UserError) and "must be called desk.yaml, but is mine.yaml" in str(other)


def test_all_but_the_probe_run_without_torch() -> None:
    code = (
        "import sys, hardware.cli, hardware.probe, hardware.fingerprint as f;"
        "hardware.cli.show('mi300x'); f.fingerprint(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
