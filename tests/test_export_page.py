"""The page that exports: the command's bytes and refusals, a picked setting labelled, every control."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from streamlit.testing.v1 import AppTest

import ridgepoint
from autotune.cli import COMMAND_VARIABLE
from autotune.export.policy import BY_HAND, Policy
from autotune.export.targets import TARGETS
from dashboards.exports import ExportInfo, command, download, export_info, pickable, policy_of
from dashboards.sources import Source, known_sources
from hardware.files import UserError
from runtime.config import DecodingConfig
from runtime.deployment import load_deployment
from tests.export_policies import TILE, policy, study, tiling
from tests.made_up import MadeUp, run, small_space, subject, unsynced

TWO_FORWARD = DecodingConfig("two_forward", draft_tokens=6)
DENOISING = DecodingConfig("denoising", draft_tokens=8, denoising_steps=8, confidence_threshold=0.9)
SOURCE = Source("runs/tune", "runs/tune", "sqlite:////nowhere/study.db", "runs/tune/study.db", "local")
POLICIES: dict[str, list[Any]] = {
    "drafts": [study(TWO_FORWARD, simulated="random weights"), tiling(16), tiling(64, kernel="lm_head")],
    "fills": [study(DENOISING), tiling(16)],
    "buckets": [study(TWO_FORWARD, batch=batch, context=256) for batch in (1, 8)],
    "tiles": [tiling(16), tiling(64, TILE | {"num_warps": 8})],
    "undecided": [study(TWO_FORWARD, decision=None)],
    "hostile": [study(DecodingConfig(), name="<b>../x"), tiling(16, model="../../x", device={"device": ".."})],
    "paths": [tiling(16, model="../../x", device={"device": ".."})],
}  # fmt: skip


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One time for all exports, and an own folder for what is temporary."""
    for module in ("evidence", "native", "step_times"):
        monkeypatch.setattr(f"autotune.export.{module}.now", lambda: "2026-11-21T10:00:00Z")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def by_command(target: str, given: Policy, out: Path, words: Sequence[str] = ()) -> dict[str, str]:
    """What `ridgepoint export` writes below `out`, by name."""
    assert ridgepoint.main(["export", "--study", "runs/tune", "--format", target, "--out", str(out), *words]) == 0
    return {p.relative_to(out if out.is_dir() else out.parent).as_posix(): p.read_text()
            for p in ([out] if out.is_file() else out.rglob("*")) if p.is_file()}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_the_page_gives_the_commands_bytes_and_its_refusals(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {}
    for name, results in POLICIES.items():
        given = policy(*results)
        monkeypatch.setattr("autotune.cli._read", lambda _, found=given: (found.studies, found.tilings))
        monkeypatch.setenv(COMMAND_VARIABLE, command(SOURCE, target))
        info = export_info(target, policy_of(SOURCE, given.studies, given.tilings, target))
        out = tmp_path / name / TARGETS[target].out
        if info.refusal is None:
            found = by_command(target, given, out)
            assert dict(info.files) == found, name
            check_download(info, found)
        else:
            refused[name] = info.refusal
            code = ridgepoint.main(["export", "--study", "runs/tune", "--format", target, "--out", str(out)])
            assert code == 2 and capsys.readouterr().err.strip().endswith(info.refusal)
            assert not info.files and not out.exists()
    assert set(refused) < set(POLICIES), "no policy of this test is one that the target can represent"
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({*POLICIES, "temporary"} - set(refused))


def check_download(info: ExportInfo, found: dict[str, str]) -> None:
    """One file as it is, several as an archive that unpacks into one folder, twice the same."""
    name, content, _ = download(info)
    if len(found) == 1:
        assert {name: content.decode()} == found
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert name == f"{info.target}.zip"
        assert {n: archive.read(n).decode() for n in archive.namelist()} == {
            f"{info.target}/{n}": text for n, text in found.items()
        }
        assert not any(part in ("..", "") for n in archive.namelist() for part in n.split("/"))
    assert download(info)[1] == content


def test_a_bucket_is_exported_like_the_commands_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = policy(*POLICIES["buckets"])
    monkeypatch.setattr("autotune.cli._read", lambda _: (given.studies, given.tilings))
    monkeypatch.setenv(COMMAND_VARIABLE, command(SOURCE, "tidar-vllm", 8, 256))
    info = export_info(
        "tidar-vllm", policy_of(SOURCE, given.studies, given.tilings, "tidar-vllm", batch=8, context=256)
    )
    words = ("--batch", "8", "--context", "256")
    assert dict(info.files) == by_command("tidar-vllm", given, tmp_path / "tidar-vllm", words)
    assert "--batch 8 --context 256 --out tidar-vllm" in command(SOURCE, "tidar-vllm", 8, 256)
    with pytest.raises(UserError, match="nothing was tuned for batch=2"):
        policy_of(SOURCE, given.studies, given.tilings, "tidar-vllm", batch=2)


def picked(result: Any, trial: int, target: str = "native") -> ExportInfo:
    return export_info(target, policy_of(SOURCE, [result], [], target, study=result.name, trial=trial))


def test_a_setting_picked_by_hand_says_so_and_claims_no_comparison(tmp_path: Path) -> None:
    decided = study(TWO_FORWARD, simulated="random weights")
    for result in (decided, replace(decided, decision=None, trials=tuple(
        replace(t, source="search" if t.number else "default") for t in decided.trials))):  # fmt: skip
        ((name, text),) = picked(result, 0).files
        (rule,) = load_deployment(write(tmp_path / name, text)).rules
        assert rule.decoding == DecodingConfig() and rule.evidence["decision"] == BY_HAND
        assert "comparison" not in rule.evidence and rule.evidence["trial"] == 0 == rule.evidence["default_trial"]
        assert "do not pay" not in text and rule.evidence["simulated"] == "random weights"
    assert "picked in `ridgepoint dashboard`" in text
    # What was decided is as it was, whoever points at it.
    ((_, text),) = picked(decided, 1).files
    assert load_deployment(write(tmp_path / "deployment.yaml", text)).rules[0].evidence["comparison"]["ratio"] == 2
    for target in ("tidar-vllm", "vllm-schedule", "sglang-diffusion", "lmdeploy-diffusion"):
        info = picked(decided, 0, target)
        beside = yaml.safe_load(next(text for name, text in info.files if name.endswith("provenance.yaml")))
        assert beside["settings"][0]["evidence"]["decision"] == BY_HAND and beside["simulated"] == "random weights"
        assert "chosen by hand" in info.says[0] and "fastest" not in " ".join(info.says)
    # A table of all settings marks what was decided.
    assert picked(decided, 0, "step-times") == picked(decided, 1, "step-times")
    assert picked(decided, 0).picked and not picked(decided, 1).picked and not picked(decided, 0, "step-times").picked
    assert picked(decided, 7).refusal is not None
    with pytest.raises(UserError, match="unknown study 'other'"):
        policy_of(SOURCE, [decided], [], "native", study="other", trial=0)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- the page


SCRIPT = "from dashboards.views import export\nexport.page()"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A study file of two buckets."""
    folder = tmp_path_factory.mktemp("tuned")
    with unsynced():
        for batch in (1, 2):
            about = subject(batch=batch, space=small_space(batch=batch), context=256, simulated="made up")
            run(folder, MadeUp(batch=batch), about, trials=3)
    return (folder / "study.db").read_bytes()


@pytest.fixture
def page(tmp_path: Path, tuned: bytes, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    """The page in a folder with that study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RIDGEPOINT_STORAGE", raising=False)
    monkeypatch.setattr("dashboards.asking.WAIT_SECONDS", 60)  # a busy machine's database is slow
    monkeypatch.setattr("dashboards.sources.folders", lambda: {"runs": tmp_path / "runs"})
    (tmp_path / "runs" / "tune").mkdir(parents=True)
    (tmp_path / "runs" / "tune" / "study.db").write_bytes(tuned)
    return AppTest.from_string(SCRIPT, default_timeout=30)


def shown(page: AppTest) -> list[str]:
    """What its warnings and errors say, without the marks that keep Markdown out."""
    assert not page.exception
    return [element.value.replace("\\", "") for element in (*page.error, *page.warning)]


def test_every_control_of_the_page(page: AppTest, tmp_path: Path) -> None:
    page.run()
    assert shown(page) == ["Simulated: made up. The files say so too."]
    files, line = (code.value for code in page.code)
    assert "max_batch: 1" in files and "max_batch: 2" in files
    assert line == "ridgepoint export --format native --study runs/tune/study.db --out deployment.yaml"
    page.selectbox(key="export-batch").select(2).run()
    assert page.code[1].value == line.replace("--out", "--batch 2 --out") and "max_batch: 1" not in page.code[0].value
    page.selectbox(key="export-context").select(256).run()
    assert "--context 256" in page.code[1].value
    for target in TARGETS:
        page.selectbox(key="export-target").select(target).run()
        refusal = next((words for words in shown(page) if "There is no file" in words), "")
        assert bool(refusal) == (target not in ("native", "step-times")) and page.query_params["target"] == target
    assert [cell.replace("\\", "") for cell in page.table[0].value["target"]] == list(TARGETS)
    page.selectbox(key="export-target").select("native").run()
    (first, *_, last) = pickable_of("runs/tune", "made-up batch=2 context=256")
    page.selectbox(key="export-study").select("made-up batch=2 context=256").run()
    assert page.query_params["trial"] == str(first) and len(shown(page)) == 1
    page.selectbox(key="export-trial").select(last).run()
    assert BY_HAND in shown(page)[1] and f"trial: {last}" in page.code[0].value and len(page.code) == 1
    link = dict(page.query_params)
    again = AppTest.from_string(SCRIPT, default_timeout=30)
    again.query_params.update(link)
    again.run()
    assert shown(again) == shown(page) and again.code[0].value == page.code[0].value


def pickable_of(source: str, name: str) -> list[int]:
    from dashboards.sources import read_source

    studies, _ = read_source(known_sources()[source])
    return list(pickable(next(s for s in studies if s.name == name)))


LINKS: list[tuple[dict[str, str], str]] = [
    ({"source": "postgresql://tuner:Zq@127.0.0.1:1/db"}, "a link names a study storage of this machine"),
    ({"source": "/etc/passwd"}, "a link names a study storage of this machine"),
    ({"source": "runs/tune", "target": "onnx"}, "unknown export format 'onnx'"),
    ({"source": "runs/tune", "batch": "64"}, "There is no batch 64 here; it is left out."),
    ({"source": "runs/tune", "batch": "-1"}, "batch >= 1"),
    ({"source": "runs/tune", "study": "<b>x"}, "There is no study <b>x here; it is left out."),
    ({"source": "runs/tune", "study": "made-up batch=1 context=256", "trial": "99"}, "There is no trial 99 here"),
]


def test_an_impossible_link_is_named_and_something_is_shown(page: AppTest) -> None:
    for link, said in LINKS:
        page = AppTest.from_string(SCRIPT, default_timeout=30)
        page.query_params.update(link)
        page.run()
        assert said in shown(page)[0] and not any("Zq" in words for words in shown(page))
        assert "max_batch: 1" in page.code[0].value
    assert page.run() and len(page.error) == 0  # said once, then forgotten


def test_a_typed_place_is_opened_by_its_button_only(page: AppTest, tmp_path: Path) -> None:
    def enter(place: str, password: str = "") -> list[str]:
        page.text_input(key="export-place").set_value(place)
        page.text_input(key="export-password").set_value(password)
        page.button(key="export-open").click().run()
        return shown(page)

    page.run()
    page.selectbox(key="export-source").select("typed").run()
    assert "must lie below one of" in enter("/etc/passwd")[0]
    (words,) = enter("postgresql://tuner:Zq1@127.0.0.1:1/db", "Zq2")
    assert "cannot reach the study storage postgresql://tuner:***@127.0.0.1:1/db" in words
    assert page.text_input(key="export-password").value == "" and "Zq" not in page.text_input(key="export-place").value
    assert page.query_params["source"] == "typed" and "Zq" not in str(page.query_params)
    tuning = AppTest.from_string(SCRIPT.replace("export", "tuning"), default_timeout=30)  # the same session there
    tuning.session_state["opened-source"] = page.session_state["opened-source"]
    tuning.session_state["last-source"] = page.session_state["last-source"]
    tuning.run()
    assert shown(tuning) == [words] and tuning.selectbox(key="tuning-source").value == "typed"
    page.selectbox(key="export-source").select("runs/tune").run()
    assert "max_batch: 1" in page.code[0].value
    (tmp_path / "runs" / "tune" / "study.db").rename(tmp_path / "runs" / "other.db")
    page.run()
    assert page.selectbox(key="export-source").value == "typed" and page.query_params["source"] == "typed"
    assert "max_batch" not in str(page.code) and enter("runs/other.db") == ["Simulated: made up. The files say so too."]


def test_a_study_without_a_setting_to_export_can_be_left_again(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    page.run()
    monkeypatch.setattr("dashboards.views.export.pickable", lambda study: {})
    study = page.selectbox(key="export-study").options.index("what was decided") + 1
    page.selectbox(key="export-study").select_index(study).run()
    assert "there is none to export" in shown(page)[0] and page.query_params["study"]
    page.selectbox(key="export-study").select_index(study - 1).run()
    assert shown(page) == ["Simulated: made up. The files say so too."] and page.query_params["study"] == ""


def test_without_a_study_the_page_says_how_to_make_one(page: AppTest, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tune" / "study.db").unlink()
    page.query_params["source"] = "typed"
    page.run()
    assert shown(page) == [] and "ridgepoint tune" in page.info[0].value
    assert "A link never opens such a place" in page.info[1].value
