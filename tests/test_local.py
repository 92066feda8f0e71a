"""What a tuning run decodes, and what its runner finds of it, in this process on a tiny random model."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autotune.local import (
    RANDOM_WEIGHTS,
    Plan,
    Work,
    config_file,
    lengthened,
    mixed_problems,
    shipped_profile,
    tune_local,
)
from autotune.objective import StageFailure
from autotune.runner import LocalRunner
from autotune.space import Candidate
from autotune.storage import storage_url
from hardware.files import UserError
from runtime.bench import identify
from runtime.bench_generation import GenerationSample
from runtime.checkpoint import save_model
from runtime.config import DecodingConfig, KernelConfig, model_config_from_json
from runtime.conversion.data import evaluation_problems
from runtime.measurement import Measurement
from runtime.model.zaya import Zaya
from runtime.quality import disagreement, shortfalls
from runtime.tokenizer import BOS, EOS, VOCABULARY, ByteTokenizer
from tests.models import TINY, noisy_model
from tests.perfmodel_cpu import made_up_cpu

CONFIG = replace(
    TINY,
    vocab_size=VOCABULARY,
    bos_token_id=BOS,
    eos_token_id=EOS,
    mask_token_id=259,
    max_position_embeddings=512,
)
TWO = Candidate(DecodingConfig("two_forward", 3), KernelConfig())


@pytest.fixture(scope="module")
def model() -> Zaya:
    return noisy_model(CONFIG)


@pytest.fixture
def runner(model: Zaya) -> LocalRunner:
    prompts = [[BOS, 1, 2, 3], [BOS, 4]]
    return LocalRunner(model, identify(model, "tiny", ""), prompts, batch=2, max_new_tokens=9, repeats=1)


# --- what is decoded


@pytest.mark.parametrize("room", [None, 60, 200, 700])
def test_prompts_are_lengthened_with_solved_problems(room: int | None) -> None:
    """Whole documents of the same family, and the problem last; less than one more would have fitted."""
    tokenizer = ByteTokenizer()
    for problem in mixed_problems(10):
        tokens = lengthened(problem, CONFIG, tokenizer, room)
        *before, last = bytes_of(tokens)
        assert last == problem.prompt
        solved = {p.prompt + p.solution for p in evaluation_problems(problem.family, 40, seed=1)}
        assert set(before) <= solved - {problem.prompt + problem.solution} and len(set(before)) == len(before)
        if room is None:
            assert not before
        else:
            longest = max([len(problem.prompt + problem.solution), *map(len, before)]) + 2
            assert room - 2 * longest < len(tokens) <= room


def test_a_context_without_room_for_a_prompt_says_what_would_do() -> None:
    short = Work("zaya-nano", context=100, prompts=3, new_tokens=90)
    with pytest.raises(UserError, match=r"--context >= \d+ must hold .* --new-tokens 90, but got 100") as refused:
        short()
    least = int(str(refused.value).split()[2])
    assert replace(short, context=least)().infeasible(TWO) is None


def bytes_of(tokens: list[int]) -> list[str]:
    """The documents of a row: each begins with BOS, and all but the last end with EOS."""
    assert tokens[0] == BOS
    found: list[bytearray] = []
    for place, token in enumerate(tokens):
        if token == BOS:
            assert place == 0 or tokens[place - 1] == EOS
            found.append(bytearray())
        elif token != EOS:
            found[-1].append(token)
    return [text.decode() for text in found]


def test_work_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown model 'gpt-17'; known: .*zaya-nano"):
        Work("gpt-17")
    with pytest.raises(UserError, match="holds no config"):
        Work(str(tmp_path))
    with pytest.raises(UserError, match="unknown model 'zaya1-8b'"):  # its weights do not ship
        Work("zaya1-8b")
    with pytest.raises(UserError, match=r"context > new_tokens = 144 must hold, but got 100"):
        Work("zaya-nano", context=100)
    with pytest.raises(UserError, match="batch >= 1"):
        Work("zaya-nano", 0)
    with pytest.raises(UserError, match="trial_seconds > 0"):
        Plan(trial_seconds=0)
    assert pickle.loads(pickle.dumps(Work("zaya-nano", 2))) == Work("zaya-nano", 2)


def test_random_weights_are_labelled_wherever_they_go(tmp_path: Path) -> None:
    """A config is enough; nothing ends early; and the study says what was not real, whatever it is told besides."""
    assert model_config_from_json(config_file("zaya1-8b", built_in=True)).hidden_size == 2048
    save_model(noisy_model(replace(CONFIG, mask_token_id=None)), tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink()
    work = Work(str(tmp_path / "tiny"), 2, 48, prompts=2, new_tokens=8, repeats=1, random=True)
    runner = work()
    described = runner.describe()
    assert described.identity.simulated == RANDOM_WEIGHTS and described.identity.model == "tiny"
    assert described.config.mask_token_id == VOCABULARY - 1
    assert (described.workload.prompt_tokens, described.workload.generated_tokens) == (40, 8)
    record, outputs = runner.measure(TWO)
    assert record.simulated == RANDOM_WEIGHTS and [len(o) for o in outputs] == [8, 8]
    plan = Plan(trials=1, rounds=6)
    result = tune_local(work, storage_url(tmp_path), made_up_cpu(), plan, simulated="a made-up CPU", isolated=False)
    assert result.subject.simulated == f"a made-up CPU; {RANDOM_WEIGHTS}"
    assert result.name == "tiny batch=2 context=48" and result.subject.context == 48


def test_a_gpus_profile_is_found_by_its_name() -> None:
    assert shipped_profile("NVIDIA H200").name == "h200"
    assert shipped_profile("NVIDIA H100 PCIe").name == "h100-pcie"
    with pytest.raises(UserError, match=r"no profile ships for Abacus 3: .*--hardware.*h200"):
        shipped_profile("Abacus 3")


# --- what the runner finds


def test_a_step_is_timed_without_acceptance(runner: LocalRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many forwards as the settings say, a threshold ends none early, and the cache is as long as in the middle."""
    from runtime.samplers.state import Decode

    seen: list[tuple[str, int, int]] = []
    right = Decode.forward

    def forward(self: Decode, kind: str, tokens: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        seen.append((kind, len(tokens), min(self.cache.lengths)))
        return right(self, kind, tokens, *rest, **options)  # type: ignore[arg-type]

    early = DecodingConfig("denoising", 4, denoising_steps=4, confidence_threshold=0.0, verify=True)
    runner.micro_benchmark(Candidate(DecodingConfig(), KernelConfig()))
    monkeypatch.setattr(Decode, "forward", forward)
    assert runner.micro_benchmark(Candidate(early, KernelConfig())) > 0
    kinds = [kind for kind, _, _ in seen]
    assert kinds.count("draft") == 4 * kinds.count("verify") >= 4 * 3
    assert all(sequences == 2 and length >= 2 + 9 // 2 - 1 for _, sequences, length in seen)


def test_pairs_take_turns_in_going_first(runner: LocalRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    right = runner._sample

    def sample(candidate: Candidate, prompts: list[list[int]]) -> GenerationSample:
        order.append(candidate.decoding.sampler)
        return right(candidate, prompts)

    monkeypatch.setattr(runner, "_sample", sample)
    default = Candidate(DecodingConfig(), KernelConfig())
    pairs = [runner.pair(default, TWO) for _ in range(2)]
    assert order == ["autoregressive", "two_forward"] * 2 + ["two_forward", "autoregressive"]
    assert all(speed > 0 for pair in pairs for speed in pair)


def test_tilings_reach_the_engine_that_has_kernels(model: Zaya, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[KernelConfig] = []

    def sample(model: Zaya, prompts: object, decoding: DecodingConfig, *, kernels: KernelConfig, **_: object) -> None:
        given.append(kernels)

    monkeypatch.setattr("autotune.runner.sample_generation", sample)
    tiles = {"router": {8: {"BLOCK_M": 16}}}
    runner = LocalRunner(
        model,
        identify(model, "tiny", ""),
        [[BOS, 1]],
        batch=1,
        max_new_tokens=2,
        tilings={"router": {8: {"BLOCK_M": 16}}},
    )
    own = {"router": {8: {"BLOCK_M": 32}}}
    for kernels in (KernelConfig(), KernelConfig(engine="graphs"), KernelConfig(engine="graphs", tilings=own)):
        runner._warm_up(Candidate(DecodingConfig(), kernels))
    assert [k.tilings for k in given] == [{}, tiles, own]


def test_what_compilers_say_is_an_outcome_of_its_own(runner: LocalRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        __module__ = "triton.runtime.errors"

    for error, outcome in (
        (OutOfResources("shared memory"), "compile"),
        (UserError("the engine compiled needs a working compiler, but compiling failed: x"), "compile"),
        (UserError("out of memory on cpu"), None),
        (RuntimeError("CUDA error"), None),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("runtime.numerics.Reference.compare", fail)
        with pytest.raises(StageFailure if outcome else type(error)) as found:
            runner.numerics(TWO)
        assert outcome is None or (found.value.outcome == outcome and str(error) in found.value.reason)  # type: ignore[attr-defined]


def test_rounding_is_no_divergence_and_a_wrong_token_is(runner: LocalRunner, model: Zaya) -> None:
    """Tokens that differ by less than the default engine's own do not count; the share of the others does."""
    record, outputs = runner.measure(Candidate(DecodingConfig(), KernelConfig()))
    assert isinstance(record, Measurement) and runner.quality(outputs) == {"divergence": 0.0}
    prompts = [[BOS, 1, 2, 3], [BOS, 4]]
    wrong = [[(outputs[0][0] + 1) % 256], list(outputs[1])]
    short = shortfalls(model, prompts, wrong)
    assert short[0][0] > 0 and max(short[1]) < 1e-5 and [len(s) for s in short] == [1, 9]
    expected = disagreement(model, prompts, wrong)
    assert runner.quality(wrong)["divergence"] == pytest.approx(expected) == 0.1
    runner._rounding, runner._judged = short[0][0], {}  # as if rounding did as much here
    assert runner.quality(wrong)["divergence"] == 0.0


def test_what_does_not_fit_is_known_before(runner: LocalRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner.infeasible(TWO) is None
    assert "on a GPU" in (runner.infeasible(Candidate(DecodingConfig(), KernelConfig(engine="graphs"))) or "")
    monkeypatch.setattr("autotune.runner.memory_bytes", lambda: 40_000)
    assert "cache and logits need" in (runner.infeasible(TWO) or "")
    gathered = Candidate(DecodingConfig("two_forward", 24), KernelConfig({1_000_000: "gather"}))
    assert "copied weights" in (runner.infeasible(gathered) or "")
