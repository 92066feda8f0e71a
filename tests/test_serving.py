"""A served model: laws of its steady state, mean TPOT apart from median ITL, and its error on rows no fit has seen."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ridgepoint
from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel.decoding import Setting, setting, time_prefill, time_step
from perfmodel.engine import DEFAULT, load_engine
from perfmodel.kernels.call import Array
from perfmodel.model_spec import load_spec
from perfmodel.parallel import Parallel
from perfmodel.precision import quantised, uniform
from perfmodel.published import fits
from perfmodel.published.interpret import interpret
from perfmodel.published.names import Catalog
from perfmodel.published.points import ServedPoint
from perfmodel.published.rows import read_rows
from perfmodel.published.served import load_of, model_kind, setting_of
from perfmodel.serving import CHUNK_TOKENS, Load, active_sequences, serve
from perfmodel.steps import step_of
from runtime.config import DecodingConfig
from tests.kernel_rows import reading_over_achieved

laws = settings(max_examples=25, deadline=None)
ENGINES = ("vllm", "tensorrt-llm", "sglang", "gpt-fast", "ideal-graph")


@cache
def at(model: str = "llama-3.1-8b", device: str = "h100-sxm", engine: str = "vllm", tensor: int = 1, expert: int = 1,
       weights: str = "bfloat16") -> Setting:  # fmt: skip
    precision = uniform("bfloat16") if weights == "bfloat16" else quantised(weights)
    return setting(load_spec(model), load_profile(device), precision, engine=engine, parallel=Parallel(tensor, expert))


SETTINGS = {
    "dense": at(),
    "moe": at("qwen3-30b-a3b", "h200", "tensorrt-llm", weights="fp8"),
    "windows": at("gpt-oss-20b", "b200"),
    "split": at("llama-3.1-70b", "h100-sxm", tensor=8),
    "replicas": at("qwen3-235b-a22b", "h200", expert=8, weights="fp8"),
    "amd": at("qwen3-8b", "mi300x", "sglang"),
}


@laws
@given(
    st.sampled_from(sorted(SETTINGS)),
    st.floats(1, 300),
    st.floats(1, 9000),
    st.floats(2, 4000),
    st.sampled_from(["sequences", "prompt"]),
    st.floats(1, 4),
)
def test_more_to_do_takes_no_less(
    name: str, sequences: float, prompt: float, generated: float, what: str, times: float
) -> None:
    """More requests in flight or longer prompts never make a token come sooner, as long as the memory holds them."""
    load = Load(sequences, prompt, generated)
    more = dataclasses.replace(load, **{what: times * getattr(load, what)})
    if float(active_sequences(SETTINGS[name], more)) < float(np.asarray(more.sequences)):
        return
    less, greater = serve(SETTINGS[name], load), serve(SETTINGS[name], more)
    for figure in ("decode_seconds", "mean_tpot_seconds", "mean_step_seconds", "bound_seconds"):
        assert getattr(greater, figure) >= getattr(less, figure) * (1 - 1e-9), figure


@laws
@given(st.sampled_from(sorted(SETTINGS)), st.floats(1, 500), st.floats(1, 20_000), st.floats(2, 8000))
def test_figures_of_one_server_agree(name: str, sequences: float, prompt: float, generated: float) -> None:
    found = serve(SETTINGS[name], Load(sequences, prompt, generated))
    assert 0 < found.bound_seconds <= found.decode_seconds <= found.mean_tpot_seconds <= found.mean_step_seconds
    assert found.decode_seconds <= found.median_itl_seconds * (1 + 1e-9)
    assert found.active <= sequences
    assert found.output_tokens_per_second * found.mean_step_seconds == pytest.approx(float(found.active))
    assert found.arrivals * generated == pytest.approx(float(found.active))
    if found.arrivals < np.log(2):  # most steps carry no prompt
        assert found.median_itl_seconds == pytest.approx(float(found.decode_seconds))


def test_the_mean_and_the_median_are_two_figures() -> None:
    """Many short answers to long prompts: prompts double the mean while the median step carries none."""
    found = serve(at(), Load(64, 4000, 200))
    assert found.arrivals < np.log(2)
    assert found.seconds("mean_tpot") > 2 * found.seconds("median_itl")
    busy = serve(at(), Load(256, 500, 150))
    assert busy.arrivals > np.log(2)
    assert busy.decode_seconds < busy.median_itl_seconds < busy.mean_step_seconds


def test_a_lone_request_waits_for_no_prompt() -> None:
    found = serve(at(), Load(1, 8000, 100))
    assert found.mean_tpot_seconds == found.decode_seconds
    assert found.mean_step_seconds > found.decode_seconds  # the next request's prompt, after its last token


@pytest.mark.parametrize("prompt", [16, 700, 3000])
def test_a_prompt_shares_the_weights_of_its_step(prompt: int) -> None:
    """It adds less than a prefill of its own takes, and a long one not much less."""
    for name in ("dense", "moe", "windows"):
        added = float(serve(SETTINGS[name], Load(32, prompt, 500)).prompt_seconds)
        alone = float(time_prefill(SETTINGS[name], 1, prompt).seconds)
        assert 0 < added < alone
        assert added > 0.5 * alone or prompt < CHUNK_TOKENS / 4


def test_a_long_prompt_costs_what_its_chunks_do() -> None:
    """No jump where a prompt no longer fits one step."""
    lengths = CHUNK_TOKENS * np.array([0.9, 0.99, 1.01, 1.1, 2.0, 4.0])
    added = serve(at(), Load(8, lengths, 1000)).prompt_seconds
    assert (np.diff(added) > 0).all()
    assert added[2] == pytest.approx(added[1], rel=0.05)
    assert 1.9 < added[4] / serve(at(), Load(8, CHUNK_TOKENS, 1000)).prompt_seconds < 2.6  # attention grows faster


def test_dividing_a_model_divides_its_weights_and_adds_sums() -> None:
    load = Load(16, 1000, 1000)
    alone, two, eight = (serve(at("llama-3.1-8b", tensor=n), load) for n in (1, 2, 8))
    assert alone.decode_seconds > two.decode_seconds > eight.decode_seconds
    assert alone.decode_seconds / 2 < two.decode_seconds and two.decode_seconds / 4 < eight.decode_seconds
    assert two.bound_seconds < alone.bound_seconds


def test_memory_limits_what_is_active() -> None:
    """Beyond what the cache holds requests queue, and tokens come no later; a narrower cache holds more."""
    held = float(active_sequences(at(), Load(10_000, 3000, 1000)))
    assert 50 < held < 500
    fits, queued = serve(at(), Load(held, 3000, 1000)), serve(at(), Load(10_000, 3000, 1000))
    assert queued.active == pytest.approx(held)
    assert queued.mean_tpot_seconds == pytest.approx(float(fits.mean_tpot_seconds))
    narrow = dataclasses.replace(at(), precision=dataclasses.replace(at().precision, cache="fp8"))
    assert active_sequences(narrow, Load(10_000, 3000, 1000)) == pytest.approx(2 * held)
    with pytest.raises(UserError, match=r"weights and one request must fit .* of h100-sxm"):
        serve(at("llama-3.1-70b"), Load(1, 100, 100))


def test_drawing_tokens_costs_by_the_logit() -> None:
    """Sampling sorts every sequence's row; the likeliest token needs no sort."""
    plain, drawn = (serve(at(), Load(np.array([8, 64]), 300, 400, drawn=d)) for d in (False, True))
    added = drawn.decode_seconds - plain.decode_seconds
    each = load_engine("vllm").hosts[DEFAULT].drawn_logit_seconds * load_spec("llama-3.1-8b").vocab_size
    assert added[1] - added[0] == pytest.approx(56 * each, rel=0.05)


def test_uneven_lengths_are_seen_longer() -> None:
    even, uneven = Load(32, 100, 1000), Load(32, 100, 1000, variation=1.0)
    assert even.context == 600 and uneven.context == 1100
    assert serve(at(), uneven).decode_seconds > serve(at(), even).decode_seconds


def test_replicas_that_share_experts_wait_for_each_other() -> None:
    """The same devices as one tensor-parallel group read each attention weight once, and exchange sums instead."""
    apart, load = SETTINGS["replicas"], Load(64, 500, 800)
    without = dataclasses.replace(apart.engine, hosts={}, sources={k: v for k, v in apart.engine.sources.items()
                                                                    if k != "hosts"}, intervals={})  # fmt: skip
    costs = apart.host_costs
    layers = apart.spec.moe_layers
    added = serve(apart, load).decode_seconds - serve(dataclasses.replace(apart, engine=without), load).decode_seconds
    assert added > layers * (costs.exchange_seconds + 8 * costs.exchange_token_seconds)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["h100-sxm", "h200", "b200", "a100-80gb-sxm", "mi300x", "rtx-4090"])
def test_every_engine_serves_on_every_device(engine: str, device: str) -> None:
    found = serve(at("llama-3.2-1b", device, engine), Load(np.array([1, 4, 16]), 500, 200))
    assert (np.diff(found.mean_tpot_seconds) > 0).all() and (np.diff(found.output_tokens_per_second) > 0).all()


@pytest.mark.parametrize("wrong", [{"sequences": 0}, {"prompt": 0}, {"generated": 0.5}, {"variation": -1.0}])
def test_impossible_loads_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"must hold, but got"):
        dataclasses.replace(Load(4, 10, 10), **wrong)  # type: ignore[arg-type]  # a field by its name


@cache
def published() -> tuple[ServedPoint, ...]:
    """Published served rows of engines that are fitted."""
    table = Path(__file__).parents[1] / "measurements" / "published" / "gpu_measured.csv"
    names = Catalog()
    points = [p for row in read_rows(table) if isinstance(p := interpret(row, names), ServedPoint)]
    return tuple(p for p in points if p.engine != "sglang" and p.metric != "total")


@cache
def unseen() -> Array:
    """Predicted over measured seconds of those rows, each from a fit to rows of other series."""
    held = fits.held_out(published())
    return np.array([h.seconds for h in held if h is not None]) / [p.measured_seconds for p in published()]


@pytest.mark.parametrize("engine", ["vllm", "tensorrt-llm", "gpt-fast"])
def test_rows_of_series_that_no_fit_saw(engine: str) -> None:
    """Mean error below the best published tool's 16.7% on such points."""
    errors = np.abs(unseen() - 1)[[p.engine == engine for p in published()]]
    assert len(errors) > 15
    assert np.mean(errors) < 0.12 and np.median(errors) < 0.1


def test_errors_of_all_and_of_mixtures_of_experts() -> None:
    errors, moe = np.abs(unseen() - 1), np.array([model_kind(p) == "moe" for p in published()])
    assert errors.mean() < 0.1
    assert moe.sum() > 50 and errors[moe].mean() < 0.125


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("engine", ["vllm", "tensorrt-llm"])
def test_four_of_five_unseen_rows_lie_within_the_stated_spread(engine: str, kind: str) -> None:
    spread = load_engine(engine).spreads[kind]
    left = np.abs(np.log(unseen()))[[p.engine == engine and model_kind(p) == kind for p in published()]]
    assert 0.7 <= (left <= spread).mean() <= 0.9


def test_no_rate_of_a_served_row_is_beyond_its_device() -> None:
    """No operator takes its bound for want of time of its own, and no experts are read faster than the device achieves.

    The factor of a fit must not make up for a coverage that has too many distinct experts.
    """
    for point in published():
        place, load = setting_of(point, load_engine(point.engine)), load_of([point])
        step = time_step(place, step_of(DecodingConfig()), active_sequences(place, load), load.context)
        assert not step.clamped.any(), point.id
        if model_kind(point) == "moe":
            assert reading_over_achieved(step.forwards[0], place) >= 1, point.id


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure for every number of requests in flight, as a table or one JSON document."""
    given = ["serving", "--model", "qwen3-30b-a3b", "--hardware", "h200", "--weights", "fp8", "--prompt", "512"]
    assert ridgepoint.main([*given, "--sequences", "2,64", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["engine"] == "vllm" and [r["sequences"] for r in document["rows"]] == [2, 64]
    found = serve(at("qwen3-30b-a3b", "h200", weights="fp8"), Load(np.array([2, 64]), 512, 1024))
    for i, row in enumerate(document["rows"]):
        assert row["mean_tpot_seconds"] == pytest.approx(float(found.mean_tpot_seconds[i]))
        assert row["active"] == row["sequences"]
    assert ridgepoint.main(given) == 0
    assert "mean TPOT ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--prompt", "300000"], "must hold, but got 301024 > 131072"),
        (["--sequences", "0"], "1 <= sequences <= 1"),
        (["--engine", "vllm", "--hardware", "l40s", "--model", "llama-3.1-70b"], "weights and one request must fit"),
        (["--engine", "ridgepoint-cpu"], "runs on a cpu"),
    ],
)
def test_the_command_refuses(extra: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ridgepoint.main(["serving", "--model", "llama-3.1-8b", "--hardware", "h100-sxm", *extra]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and len(said.err.strip().splitlines()) == 1
