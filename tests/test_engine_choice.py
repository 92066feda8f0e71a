"""Which engine runs: the fastest that can by default, the one that is asked for, or one line that says why not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

from hardware.files import UserError
from runtime import engines, graphs
from runtime.checkpoint import load_model, model_hash, save_model
from runtime.config import DecodingConfig, Engine, KernelConfig, replace
from runtime.deployment import Deployment, Rule
from runtime.engine import generate
from runtime.engines import engine_of, serves, use_engine
from runtime.fused import reference_ops, wrap
from runtime.kernels import native
from runtime.layout import block, causal, draft
from runtime.model.layers import Derived
from runtime.model.zaya import Zaya
from runtime.policy import using
from tests.models import TINY, noisy_model, random_ids

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "config", "dtype", "message"),
    [
        ("graphs", TINY, torch.float32, "the engine graphs runs on a GPU, but the model is on cpu"),
        ("lean", TINY, torch.float16, "the engine lean computes in float32 or bfloat16, but the model is in float16"),
        ("compiled", replace(TINY, attention_bias=True), torch.float32, "the engine compiled runs models without"),
        ("lean", replace(TINY, attention_bias=True), torch.float32, "the engine lean runs models without"),
        ("fast", TINY, torch.float32, "unknown engine 'fast'"),
    ],
)
def test_an_engine_that_cannot_run_here_is_one_line(
    name: str, config: object, dtype: torch.dtype, message: str
) -> None:
    model = noisy_model(config).to(dtype).freeze()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as caught:
        use_engine(model, name)
    assert "\n" not in str(caught.value)
    assert model.kernels.engine == "eager"


def test_the_default_is_the_fastest_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy_model()
    monkeypatch.setattr(native, "obstacle", lambda: "no compiler")
    assert engine_of(model) == "eager"
    with pytest.raises(UserError, match="no compiler"):
        engine_of(model, "lean")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="compiled needs a C\\+\\+ compiler: none of"):
        patch.setattr(engines.shutil, "which", lambda _: None)
        engine_of(model, "compiled")
    monkeypatch.setattr(native, "obstacle", lambda: None)
    assert engine_of(model) == "lean"
    monkeypatch.setattr(engines, "obstacle", lambda *_: None)
    assert engine_of(model) == "graphs"


def test_a_loaded_model_has_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(noisy_model(), tmp_path)
    monkeypatch.setattr(native, "obstacle", lambda: None)
    assert load_model(str(tmp_path)).kernels.engine == "lean"
    assert load_model(str(tmp_path), engine="eager").kernels.engine == "eager"
    monkeypatch.setattr(native, "obstacle", lambda: "no compiler")
    assert load_model(str(tmp_path)).kernels.engine == "eager"


@pytest.mark.parametrize("engine", ["eager", "lean"])
def test_a_model_that_changes_its_type_is_one_loaded_in_that_type(engine: Engine, tmp_path: Path) -> None:
    save_model(noisy_model(seed=3), tmp_path, dtype="bfloat16")  # so that nothing is lost on the way back
    prompts = [[1, 2, 3], list(range(4, 24))]

    def tokens(model: Zaya) -> list[list[int]]:
        return generate(model, prompts, DecodingConfig(), max_new_tokens=20).tokens

    model = load_model(str(tmp_path), engine=engine)
    narrow = load_model(str(tmp_path), dtype="bfloat16", engine=engine)
    expected = tokens(model)
    assert tokens(model.to(torch.bfloat16)) == tokens(narrow)
    for module, other in zip(model.modules(), narrow.modules(), strict=True):
        if isinstance(module, Derived) and isinstance(other, Derived):
            assert module.frozen
            for mine, theirs in zip(module.weights(), other.weights(), strict=True):
                assert (mine is theirs is None) or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
    assert tokens(model.to(torch.float32)) == expected


def test_what_may_change_stays_underived_when_it_changes_its_type() -> None:
    model = noisy_model().train().requires_grad_(True).to(torch.bfloat16)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.frozen for module in model.modules() if isinstance(module, Derived))


def test_native_kernels_refuse_what_was_made_in_another_type() -> None:
    model = use_engine(noisy_model(), "lean")
    with torch.no_grad():
        cache = model.new_cache(1, 8, 1)
        hidden = model.forward(torch.tensor([[1]]), causal(1), cache)
        model.to(torch.bfloat16)
        with pytest.raises(UserError, match=r"the cache must be in .*bfloat16 as the model, but is in .*float32"):
            model.forward(torch.tensor([[1]]), causal(1), cache)
        with pytest.raises(UserError, match=r"must be in one type, but got .*float32 and weights in .*bfloat16"):
            model.project(hidden)


def test_a_deployment_brings_its_engine_and_it_is_put_back() -> None:
    model = noisy_model()
    rule = Rule(DecodingConfig(), KernelConfig(engine="compiled"))
    elsewhere = (replace(rule, kernels=KernelConfig(engine="graphs")),)
    impossible = Deployment("tiny", model_hash(model), {}, elsewhere, "2026-11-21", "ridgepoint tune")
    with using(model), pytest.raises(UserError, match="the engine graphs runs on a GPU"):
        generate(model, [[1, 2]], impossible, max_new_tokens=2)
    with using(model, rule.kernels) as used:
        assert used.engine == model.kernels.engine == "compiled"
    assert model.kernels.engine == "eager"


def test_what_no_fused_forward_serves_is_left_to_the_eager_one() -> None:
    model = noisy_model()
    cache = model.new_cache(2, 40, 4)
    model.kernels = KernelConfig(engine="graphs")
    assert serves(model, causal(4), cache, None) and serves(model, draft(9), cache, None)
    assert not serves(model, causal(5), cache, None), "more columns than the ring has room for"
    assert not serves(model, causal(4), cache, [4, 2]), "a ragged prefill"
    assert not serves(model, block(3, (2, 1)), cache, None), "slots of their own per sequence"
    model.kernels = KernelConfig(engine="lean")
    assert serves(model, causal(30), cache, None) and serves(model, causal(30), cache, [30, 2])
    assert not serves(model, block(3, (2, 1)), cache, [2, 1])


def test_training_and_whole_texts_are_eager_whatever_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy_model()
    model.kernels = KernelConfig(engine="lean")
    monkeypatch.setattr(engines, "run", lambda *_: pytest.fail("no cache, or gradients are wanted"))
    tokens = random_ids(2, 5, TINY.vocab_size)
    model.logits(tokens)
    model.train().requires_grad_(True)
    model.forward(tokens, causal(5)).sum().backward()


def test_forwards_and_steps_run_on_the_models_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the current one is, in whatever thread."""
    model, inside, ran = noisy_model(), [0], []
    model.kernels = KernelConfig(engine="graphs")

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        assert device == model.model.embed_tokens.weight.device
        inside[0] += 1
        yield
        inside[0] -= 1

    def wrapped(_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (ran.append(inside[0]), function(*arguments))[1]

    monkeypatch.setattr(engines, "operators", lambda *_: wrap(reference_ops(), wrapped))
    for module in (engines, graphs):
        monkeypatch.setattr(module, "on_device", on_device)
    with torch.no_grad():
        model.forward(torch.tensor([[1, 2]]), causal(2), model.new_cache(1, 20, 4))
    assert ran and all(ran)
    ran.clear()
    generate(model, [[1]], DecodingConfig("two_forward", 2), max_new_tokens=4)
    assert ran and all(ran)


@pytest.mark.parametrize("engine", ["lean", "graphs"])
def test_a_dropped_cache_takes_its_forward_along(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, without the garbage collector: the next cache may need the memory."""
    model = noisy_model()
    model.kernels = KernelConfig(engine=engine)
    if engine == "graphs":
        monkeypatch.setattr(engines, "operators", lambda *_: reference_ops())
    cache = model.new_cache(1, 20, 4)
    gc.disable()
    try:
        with torch.no_grad():
            model.forward(torch.tensor([[1, 2]]), causal(2), cache)
        forward = ref(engines.bound(model, cache).forward)
        del cache
        assert forward() is None
    finally:
        gc.enable()


def test_the_compiled_engine_decodes_the_eager_tokens() -> None:
    model, prompts = noisy_model(replace(TINY, num_hidden_layers=2), seed=2), [[1, 2, 3]]
    expected = generate(model, prompts, DecodingConfig(), max_new_tokens=6).tokens
    use_engine(model, "compiled")
    found = generate(model, prompts, DecodingConfig(), max_new_tokens=6)
    assert found.tokens == expected and found.kernels.engine == "compiled"
