"""The native kernels: each operator is its reference, and one call is the whole fused forward."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.files import UserError
from runtime import fused
from runtime.cache import Cache
from runtime.config import DecodingConfig, ModelConfig, replace
from runtime.engine import generate
from runtime.fused import FusedForward, layout_arrays, reference_ops
from runtime.kernels import native
from runtime.kernels.check import Subject
from runtime.kernels.native import library, native_ops, operators
from runtime.kernels.native.forward import NativeForward, function
from runtime.kernels.problem import ODD_PROBLEMS, Problem
from runtime.kernels.registry import KERNELS, Kernel
from runtime.kernels.target import Tiling
from runtime.layout import Layout, causal, draft, single_forward
from runtime.model.zaya import Zaya
from tests.models import TINY, VARIANTS, config_of, noisy_model, random_ids

ROWS, CAPACITY, KEPT = 3, 150, 6
THREADS = [1, 2]
OPERATORS = ("embed", "residual_norm", "cca", "attention", "router", "experts")
MODELS: dict[str, Zaya] = {
    name: noisy_model(config_of(keys), seed=1) for name, keys in VARIANTS.items() if not keys.get("attention_bias")
}
LAYOUTS: dict[str, Layout] = {
    "decode": causal(1),
    "verify": causal(KEPT),
    "draft": draft(16),
    "single_forward": single_forward(4, (0, 1, 3)),
    "more slots than the ring": causal(120),
}
# Wide enough for every path of the kernels: more than one vector, item of work and block of tokens.
WIDE = ModelConfig(
    vocab_size=517,
    hidden_size=200,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=72,
    num_experts=5,
    moe_intermediate_size=150,
    router_hidden_size=100,
)


@pytest.fixture(autouse=True)
def _restored() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@contextmanager
def native_threads(count: int) -> Iterator[None]:
    """Only around native calls: torch's operators on several threads crawl where other tests run beside."""
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(1)


class NativeKernel(Kernel):
    """The kernel of the registry with its native operator in the place of Triton's."""

    def triton(self) -> Callable[..., Any]:
        function = getattr(operators, self.name)

        def call(*arguments: Any, tiling: Tiling, **named: Any) -> Any:
            with native_threads(tiling["threads"]):
                return function(*arguments, **named)

        return call


def norm_error(found: Tensor, expected: Tensor) -> float:
    difference = float((found.double() - expected.double()).norm())
    return difference and difference / float(expected.double().norm())


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("problem", [*ODD_PROBLEMS, Problem(WIDE, 2, 110, 300)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_its_reference(name: str, problem: Problem, dtype: str, threads: int) -> None:
    kernel = NativeKernel(**{f.name: getattr(KERNELS[name], f.name) for f in dataclasses.fields(Kernel)})
    result = Subject(kernel, problem, dtype, "cpu").check({"threads": threads})
    assert result.passed, str(result)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 19, 20), (3, 65, 36), (7, 130, 264), (200, 67, 50)])
def test_a_linear_layer_is_torchs(
    tokens: int, outputs: int, inputs: int, bias: bool, dtype: torch.dtype, threads: int
) -> None:
    x, weight, b = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    x, weight, b = x.to(dtype), weight.to(dtype), b.to(dtype)
    with native_threads(threads):
        found = operators.linear(x, weight, b if bias else None)
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    assert found.dtype == dtype
    assert norm_error(found, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


def prefilled(model: Zaya, counts: list[int]) -> Cache:
    """A cache of ragged sequences, filled by the eager forward."""
    cache = model.new_cache(len(counts), CAPACITY, KEPT)
    width = max(counts)
    if width:
        model.forward(random_ids(len(counts), width, model.config.vocab_size), causal(width), cache, counts=counts)
        cache.advance(counts)
    return cache


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("counts", [[14, 0, 23], [0, 0, 0]], ids=["ragged", "empty"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_one_call_is_the_whole_forward(model: Zaya, layout: Layout, counts: list[int], threads: int) -> None:
    tokens = random_ids(ROWS, layout.slots, model.config.vocab_size, seed=3)
    reference, mine = prefilled(model, counts), prefilled(model, counts)
    lengths = torch.tensor(counts, dtype=torch.int32)
    expected, routes = FusedForward(model, reference_ops(), reference).forward(tokens, layout, lengths)
    forward = FusedForward(model, native_ops(), mine)
    for _ in range(2):  # with the memory of the first, and without changing what it reads
        with native_threads(threads):
            hidden, chosen = forward.forward(tokens, layout, lengths)
        if layout.slots > mine.ring:
            break  # a ring that was overwritten is read no more
    assert hidden.shape == expected.shape
    assert norm_error(hidden, expected) < 1e-5
    assert torch.equal(chosen, routes)
    assert norm_error(forward.project(hidden), model.project(expected)) < 1e-5
    for name in ("keys", "values", "columns"):
        for layer, wanted in enumerate(getattr(reference, name)):
            assert norm_error(getattr(mine, name)[layer], wanted) < 1e-5, f"{name} of layer {layer}"


def test_ragged_prefills_and_padding_are_the_fused_forwards() -> None:
    model, tokens = MODELS["shrunk"], random_ids(ROWS, 31, 96, seed=4)
    reference, mine = prefilled(model, [3, 0, 8]), prefilled(model, [3, 0, 8])
    lengths, counts = torch.tensor([3, 0, 8], dtype=torch.int32), [5, 31, 0]
    expected, routes = FusedForward(model, reference_ops(), reference).forward(
        tokens, causal(31), lengths, counts=counts
    )
    forward = FusedForward(model, native_ops(), mine)
    hidden, chosen = forward.forward(tokens, causal(31), lengths, counts=counts)
    assert norm_error(hidden, expected) < 1e-5
    assert torch.equal(chosen, routes)
    active = torch.tensor([2], dtype=torch.int32)
    _, chosen = forward.forward(tokens[:, :1], causal(1), lengths, active=active)
    assert (chosen[:, 2:] == model.config.num_experts).all()
    assert (chosen[:, :2] != model.config.num_experts).any()


def test_bfloat16_rounds_where_eager_rounds() -> None:
    model = noisy_model(config_of({})).to(torch.bfloat16).freeze()
    eager, mine = prefilled(model, [5, 9, 0]), prefilled(model, [5, 9, 0])
    tokens, lengths = random_ids(ROWS, 4, model.config.vocab_size, seed=6), torch.tensor([5, 9, 0], dtype=torch.int32)
    expected = model.forward(tokens, causal(4), eager)
    hidden, _ = FusedForward(model, native_ops(), mine).forward(tokens, causal(4), lengths)
    assert hidden.dtype == torch.bfloat16
    assert norm_error(hidden, expected) < 1e-2


SETTINGS = [
    DecodingConfig(),
    DecodingConfig("two_forward", draft_tokens=5),
    DecodingConfig("single_forward", draft_tokens=3, proposal_levels=(0, 2)),
    DecodingConfig("denoising", draft_tokens=4, denoising_steps=2, verify=True),
    DecodingConfig("denoising", draft_tokens=4, denoising_steps=2),
]


@pytest.mark.parametrize("decoding", SETTINGS, ids=lambda d: d.sampler)
def test_generated_tokens_are_the_eager_ones(decoding: DecodingConfig) -> None:
    model = noisy_model(TINY, seed=2)
    prompts = [list(range(1, n)) for n in (3, 9, 28)]
    expected = generate(model, prompts, decoding, max_new_tokens=30)
    model.kernels = replace(model.kernels, engine="lean")
    assert generate(model, prompts, decoding, max_new_tokens=30).tokens == expected.tokens
    assert generate(model, prompts, decoding, max_new_tokens=30, batch=2).tokens == expected.tokens


def test_what_lies_outside_is_refused() -> None:
    model = MODELS["shrunk"]
    forward = FusedForward(model, native_ops(), model.new_cache(1, 8, 1))
    lengths = torch.tensor([7], dtype=torch.int32)
    with pytest.raises(IndexError, match="tokens must be known"):
        forward.forward(torch.tensor([[model.config.vocab_size]]), causal(1), lengths)
    with pytest.raises(IndexError, match="slots must fit the cache"):
        forward.forward(torch.tensor([[1, 2]]), causal(2), lengths)


def test_the_time_of_a_forward_is_that_of_its_operators() -> None:
    model = MODELS["shrunk"]
    forward = NativeForward(FusedForward(model, reference_ops(), model.new_cache(1, 80, 64)))
    assert forward.times() == {}
    forward(random_ids(1, 64, 96), layout_arrays(causal(64), 2), torch.zeros(1, dtype=torch.int32), None, 0)
    found = forward.times(False)
    assert set(found) == set(fused.OPERATORS.values()) - {"lm_head"}
    assert all(seconds > 0 for seconds in found.values())


def forget() -> None:
    for known in (library.load, native.obstacle, function):
        known.cache_clear()


@pytest.fixture
def uncached() -> Iterator[None]:
    """Nothing of the library is remembered, before the test and after it."""
    forget()
    yield
    forget()


NEEDED = "the engine lean needs its kernels compiled, but "
COMPILERS = {
    "no-such-compiler": "the engine lean needs a C compiler: none of no-such-compiler was found",
    "no-such-compiler -O2": "the engine lean needs a C compiler: none of no-such-compiler was found",
    "cc 'unclosed": """CC must be a command with its arguments, but got "cc 'unclosed\"""",
    "false": f"{NEEDED}{shutil.which('false')} failed: exit code 1",
    "true": f"{NEEDED}{shutil.which('true')} made no native.o",
    "sh -c 'echo one; echo an  error >&2; exit 3'": (
        f"{NEEDED}{shutil.which('sh')} -c 'echo one; echo an  error >&2; exit 3' failed: an error"
    ),
}


@pytest.mark.parametrize(("command", "message"), COMPILERS.items(), ids=COMPILERS)
def test_a_missing_or_failing_compiler_is_one_line(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uncached: None
) -> None:
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path))
    monkeypatch.setenv("CC", command)
    assert native.obstacle() == message
    with pytest.raises(UserError) as caught:
        native_ops()
    assert str(caught.value) == message


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, uncached: None) -> None:
    library.load()
    built = sorted(library.home().iterdir())
    library.load.cache_clear()
    monkeypatch.setattr(library, "_build", lambda *_: pytest.fail("compiled again"))
    library.load()
    assert sorted(library.home().iterdir()) == built


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros in the middle": lambda content: content[:4096] + bytes(len(content) - 8192) + content[-4096:],
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_compiled_again(
    damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uncached: None
) -> None:
    whole = Path(library.load()._name).read_bytes()
    kept = tmp_path / "native" / Path(library.load()._name).name
    kept.parent.mkdir()
    kept.write_bytes(damage(whole))
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path))

    def build(compiler: Any, runtime: Any, folder: Path, key: str) -> Path:
        assert kept == folder / f"{key}-{hashlib.sha256(whole).hexdigest()[:16]}.so"
        kept.unlink()
        kept.write_bytes(whole)
        return kept

    monkeypatch.setattr(library, "_build", build)
    forget()
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    assert torch.equal(operators.linear(x, weight, None), x @ weight.T)
    assert kept.read_bytes() == whole


# In a process of its own, which compiles.
MULTIPLY = """
import torch
from runtime.kernels.native.operators import linear
x, w = torch.arange(6.).view(2, 3), torch.arange(12.).view(4, 3)
print(torch.equal(linear(x, w, None), x @ w.T))
"""


# What the compiler makes is not looked at here, but that it makes it: without optimising, in an eighth of the time.
UNOPTIMISED = """sh -c 'exec cc "$@" -O0' cc"""


def multiply(**environment: str) -> None:
    """Use the native kernels in a new process."""
    environment = {**os.environ, "CC": UNOPTIMISED, **environment}
    done = subprocess.run([sys.executable, "-c", MULTIPLY], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_new_process_mends_a_damaged_library(tmp_path: Path) -> None:
    """Like the one that the first process made: of the same key, under which a third would find it."""
    multiply(RIDGEPOINT_HOME=str(tmp_path))
    [kept] = (tmp_path / "native").glob("*.so")
    kept.write_bytes(DAMAGES["zeros in the middle"](kept.read_bytes()))
    assert not library._whole(kept)
    multiply(RIDGEPOINT_HOME=str(tmp_path))
    libraries = [path for path in kept.parent.glob("*.so") if library._whole(path)]
    assert [path.name.partition("-")[0] for path in libraries] == [kept.name.partition("-")[0]]


def test_without_a_home_to_write_a_process_compiles_for_itself(tmp_path: Path) -> None:
    home, temporary = tmp_path / "no folder", tmp_path / "temporary"
    home.write_text("")
    temporary.mkdir()
    multiply(RIDGEPOINT_HOME=str(home), TMPDIR=str(temporary))
    assert not list(temporary.iterdir())
