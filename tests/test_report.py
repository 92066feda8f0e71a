"""The report: one self-contained file that says what was found, in every outcome, and obeys no text it shows."""

from __future__ import annotations

import dataclasses
import os
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from autotune.objective import Comparison
from autotune.results import Decision, StudyResult, Subject, TrialRecord
from autotune.space import decoding_space
from dashboards.changes import change_info
from dashboards.choice import Answer, Choice, answer, explanation, pays_map
from dashboards.document import Code, Fold, Note, Section, Table, Text, write_document
from dashboards.evidence import front_info
from dashboards.maps import map_of
from dashboards.report import (
    Results,
    Speedup,
    TunedRun,
    speedup_sentence,
    write_report,
)
from dashboards.trials import decision_sentence, front_points
from hardware.files import UserError
from hardware.profile import (
    BandwidthPoint,
    Curves,
    HardwareProfile,
    MatmulPoint,
    MemoryLevel,
    load_profile,
)
from perfmodel.decoding import predict
from perfmodel.engine import engine_for
from perfmodel.model_spec import ModelSpec, spec_from_config
from perfmodel.validation import Row
from runtime.config import DecodingConfig, KernelConfig, ModelConfig, Workload
from runtime.deployment import Deployment, Rule
from runtime.measurement import Measurement

FINGERPRINT = {"device": "made-up CPU", "cpu": "made-up CPU", "cores": 2, "memory_bytes": 8_000_000_000, "triton": None}
DRAFTING = DecodingConfig("two_forward")


def machine(name: str = "local-cpu") -> HardwareProfile:
    """A CPU as a probe would describe it, made up so that no test depends on the machine it runs on."""
    matmuls = tuple(
        MatmulPoint("float32", 1, m, n, n, 2e-6 + 2 * m * n * n / 2e10, 4e6) for m in (1, 4, 16, 64) for n in (64, 256)
    )
    bandwidth = tuple(BandwidthPoint(size, rate) for size, rate in ((1e5, 1e11), (4e6, 5e10), (1e8, 1e10)))
    groups = (
        "compute_units", "warp_size", "shared_memory_bytes", "peak_flops_per_second", "achieved_flops_per_second",
        "memory", "launch_seconds", "graph_node_seconds", "measured",
    )  # fmt: skip
    return HardwareProfile(
        name=name,
        vendor="none",
        kind="cpu",
        compile_target="cpu",
        compute_units=2,
        warp_size=1,
        shared_memory_bytes=32768,
        peak_flops_per_second={"float32": 5e10},
        achieved_flops_per_second={"float32": 2e10},
        memory=(MemoryLevel("l2", 1e6, 1.2e11, 1e11), MemoryLevel("memory", 8e9, 1.2e10, 1e10)),
        launch_seconds=1e-6,
        graph_node_seconds=1e-6,
        sources={group: "derived: made up" for group in groups},
        measured=tuple(Curves(n, 1e-6, 2e-6, 1e-6, bandwidth, matmuls) for n in (1, 2)),
        fingerprint=FINGERPRINT,
    )


def tiny() -> ModelConfig:
    """A model of this architecture over bytes, small enough to run in tests."""
    return ModelConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, moe_intermediate_size=32, router_hidden_size=16, max_position_embeddings=512, pad_token_id=256,
        bos_token_id=257, eos_token_id=258, mask_token_id=259,
    )  # fmt: skip


def generation(decoding: DecodingConfig, histogram: tuple[int, ...] = ()) -> Measurement:
    return Measurement(
        kind="generation",
        model="tiny",
        model_hash="0" * 16,
        device=FINGERPRINT,
        command="ridgepoint bench",
        commit="abc",
        date="2026-01-01T00:00:00Z",
        workload=Workload(1, 20, 64),
        decoding=decoding,
        kernels=KernelConfig(threads=1),
        slots=decoding.slots,
        context=52,
        seconds=(1.0, 1.1, 0.9),
        tokens=(64, 64, 64),
        forwards=64,
        acceptance_histogram=histogram,
    )


def speedup(ratio: float = 1.5, low: float = 1.4, high: float = 1.6, spec: ModelSpec | None = None) -> Speedup:
    single, drafting = generation(DecodingConfig()), generation(DRAFTING, (10, 5, 5))
    spec = spec or spec_from_config(tiny(), "tiny")
    predictions = [
        predict(
            spec, machine(), m.workload, m.decoding, context=m.context, acceptance_length=m.acceptance_length,
            kernels=m.kernels,
        )
        for m in (drafting, single)
    ]  # fmt: skip
    return Speedup(1, ratio, low, high, single, drafting, Answer(*predictions, None))


def trials() -> tuple[TrialRecord, ...]:
    base: dict[str, Any] = {"sampler": "two_forward", "threads": 1, "anchor_draft": False, "experts_block": "loop"}
    speeds = (100.0, 180.0, 250.0)
    found = [
        TrialRecord(
            n, {**base, "draft_tokens": 4 + n, "mixing_weight": 1.0 - n / 4}, "correct", "quality", tokens_per_second=s,
            divergence=n / 10, predicted_tokens_per_second=s * 1.1, acceptance_histogram=(1, 2, 3), seconds=(1.0,),
        )
        for n, s in enumerate(speeds)
    ]  # fmt: skip
    broken = TrialRecord(
        3, {**base, "draft_tokens": 24, "mixing_weight": 1.0}, "infeasible", "feasibility", "too large"
    )
    return (*found, broken)


def study(trial: int = 1, low: float = 1.5, comparison: bool = True, decided: bool = True) -> StudyResult:
    space = decoding_space(batch=1, cores=2)
    subject = Subject("tiny", "0" * 16, FINGERPRINT, Workload(1, 20, 64), "prompts", space)
    compared = Comparison(180.0, 100.0, 1.8, low, 2.1, 8) if comparison else None
    reason = "faster than the default" if trial else "the gain over the default is inside the noise"
    decision = Decision(trial, 0, 1, reason, compared, 0.1, 4, "ridgepoint tune", "2026-01-01T00:00:00Z")
    return StudyResult("tiny batch=1", subject, trials(), decision if decided else None)


@cache
def beyond() -> dict[str, Any]:
    """The maps of the full-size model, and what would change it."""
    choice = Choice()
    devices = {name: load_profile(name) for name in choice.devices}
    return {
        "maps": tuple(map_of(choice, name, pays_map(choice.on(name), device)) for name, device in devices.items()),
        "changes": change_info({name: explanation(choice.on(name), device) for name, device in devices.items()}),
    }


def results(**changes: Any) -> Results:
    profiles = [load_profile(name) for name in ("h100-sxm", "mi300x")]
    rows = [Row(f"point {n}", "forward", 0.001 * n, 0.0011 * n, 0.0001 * n, fitted=n % 2 == 0) for n in range(1, 9)]
    whole = Results(
        model="tiny",
        command="ridgepoint demo --quick",
        commit="abc",
        date="2026-01-01 00:00 UTC",
        seconds=60.0,
        simulated=None,
        machine=machine(),
        engine=engine_for(machine(), None),
        elsewhere=tuple((profile, answer(Choice(), profile)) for profile in profiles),
        elsewhere_acceptance="Acceptance as published.",
        **beyond(),
        rows=tuple(rows),
        speedups=(speedup(),),
        study=study(),
        deployment=Deployment(
            "tiny", "0" * 16, FINGERPRINT, (Rule(DRAFTING, KernelConfig(threads=1)),), "2026-01-01", "ridgepoint export"
        ),
        tuned=TunedRun(DRAFTING, ("add 1+1",), ("= 2",), (True,), 123.4, 3.2, 20),
        commands=(("Probe:", "ridgepoint hardware probe"),),
        artefacts=(("report.html", "this report"),),
    )
    return dataclasses.replace(whole, **changes)


class Page(HTMLParser):
    """What a browser would load, show and run."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.scripts = 0
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.scripts += tag == "script"
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        assert not any(k.startswith("on") for k, _ in attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open or "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


def written(path: Path, **changes: Any) -> Page:
    write_report(path, results(**changes))
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    page = written(tmp_path / "report.html")
    assert all(reference.startswith("#") for reference in page.references)
    assert "link" not in page.tags and "img" not in page.tags and "iframe" not in page.tags
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none';", text)
    assert text.count("plotly.js v") == 1  # the library once, not once per figure
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_report_has_every_part(tmp_path: Path) -> None:
    page = written(tmp_path / "report.html")
    assert page.headings == [
        "In short",
        "What was asked",
        "This machine",
        "Predicted: zaya1-8b on h100-sxm and mi300x",
        "Predicted: tiny on this machine",
        "Predicted versus measured",
        "Measured: autoregressive against lossless two_forward, default settings",
        "Tuning",
        "The tuned run",
        "The exported deployment",
        "How to repeat it",
    ]
    for expected in (
        "made-up CPU", "8 GB", "nothing here was measured", "Acceptance as published.", "median absolute error 10%",
        "1.40 to 1.60", "infeasible: too large", "add 1+1", "= 2", "123 tokens/s", "sampler: two_forward",
        "ridgepoint hardware probe", "this report", "derived: made up", "mixing_weight 0.75",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "Simulated" not in page.text


def test_simulated_data_is_labelled_in_every_part_it_enters(tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", simulated="random weights")
    assert page.text.count("Simulated: random weights.") == 6


def test_a_machine_is_described_with_units_and_sources(tmp_path: Path) -> None:
    text = written(tmp_path / "report.html").text
    assert "50 GFLOP/s" in text  # peak
    assert "120 GB/s" in text  # the cache's bandwidth
    assert "1 µs" in text  # launch
    assert "triton" not in text[: text.index("Predicted: zaya1-8b on")]  # what is not installed is no fact


def page_of(text: str, folder: Path) -> Page:
    """A report in which everything that comes from outside is `text`."""
    changed = (dataclasses.replace(trials()[0], reason=text), *trials()[1:])
    return written(
        folder / "report.html",
        model=text,
        command=text,
        simulated=text,
        elsewhere_acceptance=text,
        tuned=TunedRun(DRAFTING, (text,), (text,), (False,), 1.0, 1.0, 1),
        commands=((text, text),),
        artefacts=((text, text),),
        rows=(Row(text, "forward", 1.0, 1.1, 0.1, False),),
        study=dataclasses.replace(study(), trials=changed),
        deployment=dataclasses.replace(results().deployment, model=text),
    )


@pytest.mark.parametrize("hostile", ["</pre><img src=x onerror=alert(1)>", '</script><script>"&'])
def test_no_text_becomes_markup(hostile: str, tmp_path: Path) -> None:
    page = page_of(hostile, tmp_path)
    assert page.tags == page_of("harmless", tmp_path).tags
    assert page.text.count(hostile) > 8


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("old")
    with pytest.raises(UserError, match="cannot write"):
        write_report(blocked / "report.html", results())
    assert blocked.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(1.2, 1.6, "so it pays"), (0.5, 0.9, "so it does not pay"), (0.9, 1.1, "inside the noise")],
)
def test_a_speedup_is_judged_by_its_interval(low: float, high: float, words: str) -> None:
    sentence = speedup_sentence(speedup((low + high) / 2, low, high))
    assert words in sentence
    assert f"[{low:.2f}, {high:.2f}]" in sentence
    assert "two forwards of 17 slots" in sentence
    assert "A step commits 1.75 tokens" in sentence  # (10 * 1 + 5 * 2 + 5 * 3) / 20


def test_the_decision_is_told_with_its_evidence() -> None:
    gained = decision_sentence(study())
    assert gained.startswith("Chosen: sampler two_forward, threads 1, ")
    assert "1.80x the default [1.50, 2.10]: 180 tokens/s against 100 tokens/s" in gained
    assert "not lossless by construction: in these prompts 10% of the tokens are not the model's own greedy" in gained
    lossless = (trials()[0], dataclasses.replace(trials()[1], params={**trials()[1].params, "mixing_weight": 1.0}))
    assert decision_sentence(dataclasses.replace(study(), trials=lossless)).endswith("It is lossless.")
    kept = decision_sentence(study(trial=0, low=0.95))
    assert kept.startswith("The default stays: the gain over the default is inside the noise.")
    assert "[0.95, 2.10]" in kept
    single = dataclasses.replace(trials()[0], number=9, params={"sampler": "autoregressive", "threads": 2})
    beside = dataclasses.replace(study(), trials=(*trials(), single))
    assert "The fastest autoregressive setting gave 100 tokens/s." in decision_sentence(beside)
    assert "fastest autoregressive" not in gained
    assert "alternating" not in decision_sentence(study(trial=0, comparison=False))
    assert "stopped before" in decision_sentence(study(decided=False))


def test_a_study_becomes_a_front() -> None:
    info = front_info(front_points(study()))
    assert [p.tokens_per_second for p in info.front] == [100.0, 180.0, 250.0]  # each faster one diverges more
    assert [(p.default, p.chosen) for p in info.front] == [(True, False), (False, True), (False, False)]
    assert [p.label.split(", ")[-2:] for p in info.infeasible] == [["draft_tokens 24", "mixing_weight 1 (infeasible)"]]
    undecided = front_info(front_points(study(decided=False)))
    assert not any(p.default or p.chosen for p in (*undecided.front, *undecided.infeasible))


@pytest.mark.parametrize("decided", [True, False])
def test_any_outcome_of_tuning_can_be_reported(decided: bool, tmp_path: Path) -> None:
    page = written(tmp_path / "report.html", study=study(trial=0, comparison=False, decided=decided), speedups=())
    assert len(page.headings) == 11


def test_a_document_of_every_block(tmp_path: Path) -> None:
    table = Table(("name", "value"), (("a", "1.5"), ("b", "2")))
    blocks = (Text("text"), Note("note"), Code("line 1\nline 2"), table, Fold("more", table))
    path = write_document(tmp_path / "x.html", "Title", "lead", [Section("One", blocks), Section("Two", ())])
    page = Page(path.read_text(encoding="utf-8"))
    assert page.headings == ["One", "Two"]
    assert page.references == ["#section-1", "#section-2"]
    assert page.tags.count("table") == 2
    assert page.tags.count("td") == 8
    assert 'class="number">1.5<' in path.read_text()
    assert "line 1\nline 2" in page.text
