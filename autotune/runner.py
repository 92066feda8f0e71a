"""Trials on this machine with the real model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from autotune.objective import Outputs, StageFailure
from autotune.space import Candidate
from hardware.files import UserError
from hardware.fingerprint import memory_bytes
from runtime.batching import Batcher, Request
from runtime.bench import Identity, dtype_of
from runtime.bench_generation import GenerationSample, generation_record, sample_generation
from runtime.config import DTYPE_BYTES, DecodingConfig, Engine, KernelConfig, ModelConfig, Workload, replace, require
from runtime.conversion.tasks import Problem
from runtime.engines import obstacle, unbuilt
from runtime.measurement import Measurement
from runtime.model.zaya import Zaya
from runtime.numerics import REFERENCE, TOLERANCE, Reference
from runtime.policy import using
from runtime.quality import exact_match, shortfalls
from runtime.tokenizer import Tokenizer

STEPS = 9  # of a micro-benchmark, at most; the first of each batch warms up
_ENOUGH_SECONDS = 1.0  # of timed steps, after which three are enough
_CAPTURED = ("compiled", "graphs")  # engines that prepare each number of sequences, which a pass comes to as it drains


@dataclass(frozen=True)
class Described:
    """What a runner works on: all that a search must know of the model without having it."""

    identity: Identity
    config: ModelConfig
    workload: Workload
    prompts: str  # hash of the token ids
    engine: Engine  # that runs the model by default
    threads: int
    remark: str = ""  # why a faster engine was passed over


class LocalRunner:
    """Decodes all prompts, `batch` at a time; one sample is a pass over all of them, so that samples are equal work.

    problems: where the prompts come from, if their answers can be checked. A pass counts decoding, not the prefill.
    tilings: of the Triton kernels, for settings that bring none of their own.
    What eager forwards and autoregressive decoding gave is kept for later trials.
    """

    def __init__(
        self,
        model: Zaya,
        identity: Identity,
        prompts: Sequence[Sequence[int]],
        *,
        batch: int,
        max_new_tokens: int,
        repeats: int = 2,
        problems: Sequence[Problem] = (),
        tokenizer: Tokenizer | None = None,
        tilings: Mapping[str, Mapping[int, Mapping[str, int]]] | None = None,
    ) -> None:
        require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
        require(
            len(prompts) >= batch and len(prompts) % batch == 0,
            f"the prompts must fill batches of {batch}, but there are {len(prompts)}",
        )
        require(not problems or len(problems) == len(prompts), "each prompt must have its problem, or none")
        self._model, self._identity, self._prompts = model, identity, [list(p) for p in prompts]
        self._batch, self._new_tokens, self._repeats = batch, max_new_tokens, repeats
        self._problems, self._tokenizer = list(problems), tokenizer
        self._tilings = {name: {m: dict(t) for m, t in of.items()} for name, of in (tilings or {}).items()}
        self._engine, self._dtype = self._tiled(model.kernels), dtype_of(model)
        self._reference = Reference(model)
        self._single: list[list[int]] = []  # what autoregressive decoding gave
        self._rounding = 0.0
        self._judged: dict[tuple[tuple[int, ...], ...], dict[str, float]] = {}
        self._warm: set[str] = set()
        self._paired: tuple[Candidate, Candidate] | None = None
        self._pairs = 0

    def describe(self) -> Described:
        """What it works on."""
        count = len(self._prompts)
        length = max(1, round(sum(map(len, self._prompts)) / count))
        return Described(
            self._identity,
            self._model.config,
            Workload(self._batch, length, self._new_tokens, self._dtype),
            hashlib.sha256(json.dumps(self._prompts).encode()).hexdigest()[:12],
            self._engine.engine,
            torch.get_num_threads(),
            unbuilt(self._model) or "",
        )

    def infeasible(self, candidate: Candidate) -> str | None:
        """Masks to draft with, positions, an engine that runs here, and memory."""
        config, (decoding, kernels) = self._model.config, candidate
        if decoding.drafts and config.mask_token_id is None:
            return f"{decoding.sampler} drafts with masks, but the model has no mask_token_id"
        needed = max(map(len, self._prompts)) + self._new_tokens
        if needed > config.max_position_embeddings:
            return f"prompt and new tokens need {needed} positions, but the model has {config.max_position_embeddings}"
        reason = obstacle(self._model, kernels.engine)
        if reason is not None:
            return reason
        value_bytes, available = DTYPE_BYTES[self._dtype], self._memory_bytes()
        tokens = self._batch * decoding.slots
        copied = {"gather": tokens, "dense": config.num_experts}.get(kernels.expert_mode(tokens), 0)
        copied = copied if kernels.engine == "eager" else 0
        size = copied * 3 * config.hidden_size * config.moe_intermediate_size * value_bytes
        if size > available / 2:
            return f"the experts' copied weights need {size / 1e9:.1f} GB, more than half of the memory"
        cached = 2 * config.num_hidden_layers * config.kv_size * value_bytes * (needed + decoding.slots) * self._batch
        logits = 3 * 4 * config.vocab_size * self._batch * (2 * decoding.draft_tokens + 1 if decoding.drafts else 1)
        size = cached + logits
        if size > 0.9 * available:
            return f"cache and logits need {size / 1e9:.1f} GB, but beside the weights there are {available / 1e9:.1f}"
        return None

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        """Its forwards beside eager ones, of the workload's sizes and odd ones: see `runtime.numerics`."""
        prompt = max(map(len, self._prompts))
        context = min(prompt + self._new_tokens // 2, self._model.config.max_position_embeddings - 1)
        try:
            kernels = self._tiled(candidate.kernels)
            found = self._reference.compare(candidate.decoding, kernels, self._batch, context)
        except UserError as error:
            if "compil" in str(error):  # the compiler's words, as `runtime.fused` passes them on
                raise StageFailure("compile", str(error)) from error
            raise
        except Exception as error:
            if type(error).__module__.startswith("triton"):  # its compilers' own errors, and too little shared memory
                raise StageFailure("compile", f"{type(error).__name__}: {error}") from error
            raise
        reason = found.obstacle(self._dtype)
        findings = {"logit_error": found.error, "rerouted": found.rerouted, "argmax_agreement": found.argmax}
        if reason is not None:
            raise StageFailure("incorrect", reason, findings)
        return findings

    def micro_benchmark(self, candidate: Candidate) -> float:
        """Seconds of a step of one full batch, from the middle of its generation on, sampling included.

        The fastest of several: what else the machine does only adds, and what ends as slower must be so for certain. A
        confidence threshold ends no block early here, so that the step is the one that is predicted.
        """
        decoding, kernels = candidate.decoding, self._tiled(candidate.kernels)
        if decoding.confidence_threshold is not None:
            decoding = replace(decoding, confidence_threshold=None)
        self._decode_singly()
        begun = [
            prompt + single[: self._new_tokens // 2] for prompt, single in zip(self._prompts, self._single, strict=True)
        ][: self._batch]
        # As long as a pass needs it, so that the engine `graphs` keeps one cache, and its graphs, for both.
        context = max(map(len, self._prompts)) + self._new_tokens
        samples: list[float] = []
        with using(self._model, kernels):
            while not _enough(samples):
                batcher = Batcher(self._model, decoding, batch=self._batch, context=context)
                for index, tokens in enumerate(begun):
                    room = min(context, self._model.config.max_position_embeddings) - len(tokens)
                    batcher.submit(Request(tokens, max(1, room), (0, index), ()))
                batcher.step()
                taken = len(samples)
                while not _enough(samples) and batcher.active == self._batch:
                    before = batcher.decode_seconds
                    batcher.step()
                    samples.append(batcher.decode_seconds - before)
                if len(samples) == taken:  # a step fills what is left of the context: the first one must do
                    samples.append(batcher.decode_seconds)
        if kernels.engine not in _CAPTURED:
            self._warm.add(repr(candidate))
        return min(samples)

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        """`repeats` passes."""
        if repr(candidate) not in self._warm:
            self._warm_up(candidate)
        samples = [self._sample(candidate, self._prompts) for _ in range(self._repeats)]
        record = generation_record(
            self._model,
            self._identity,
            self._prompts,
            candidate.decoding,
            samples,
            kernels=self._tiled(candidate.kernels),
            batch=self._batch,
            max_new_tokens=self._new_tokens,
        )
        return record, samples[0].outputs

    def quality(self, outputs: Outputs) -> dict[str, float]:
        """`divergence`: share of tokens that eager, causal forwards over the same text would not have chosen.

        The judge is the eager engine, because a wrong kernel must not be its own. A token counts that is further behind
        the judge's choice than any that autoregressive decoding took by the model's default engine: less is rounding,
        which in a narrow type decides many near ties, most of all between the logits of random weights. No more than
        the tolerance of a forward is put down to rounding.
        """
        key = tuple(tuple(o) for o in outputs)
        if key not in self._judged:
            self._decode_singly()
            found = {"divergence": self._divergence(outputs)}
            if self._problems and self._tokenizer:
                texts = [self._tokenizer.decode(list(o)) for o in outputs]
                found["exact_match"] = exact_match(self._problems, texts).value
            self._judged[key] = found
        return dict(self._judged[key])

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        """A pass of each, the second one first in every other round; warmed up before the first."""
        settings = default, candidate
        if self._paired != settings:
            self._paired = settings
            for setting in settings:
                self._warm_up(setting)
        order = (0, 1) if self._pairs % 2 == 0 else (1, 0)
        self._pairs += 1
        speeds = {place: self._sample(settings[place], self._prompts).tokens_per_second for place in order}
        return speeds[0], speeds[1]

    def close(self) -> None:
        """Nothing is held that outlives it."""

    def _decode_singly(self) -> None:
        """Decode autoregressively by the default engine, once: what drafts continue, and how it rounds."""
        if not self._single:
            default = Candidate(DecodingConfig(), self._engine)
            self._single = [list(o) for o in self._sample(default, self._prompts).outputs]
            short = self._shortfalls(self._single)
            self._rounding = min(2 * max(chain([0.0], *short)), TOLERANCE[self._dtype])

    def _divergence(self, outputs: Outputs) -> float:
        short = list(chain(*self._shortfalls(outputs)))
        return sum(s > self._rounding for s in short) / len(short)

    def _shortfalls(self, outputs: Outputs) -> list[list[float]]:
        with using(self._model, REFERENCE):
            return shortfalls(self._model, self._prompts, outputs)

    def _warm_up(self, candidate: Candidate) -> None:
        """Decode a batch that nobody times."""
        self._sample(candidate, self._prompts[: self._batch])
        self._warm.add(repr(candidate))

    def _sample(self, candidate: Candidate, prompts: list[list[int]]) -> GenerationSample:
        return sample_generation(
            self._model,
            prompts,
            candidate.decoding,
            kernels=self._tiled(candidate.kernels),
            batch=self._batch,
            max_new_tokens=self._new_tokens,
        )

    def _tiled(self, kernels: KernelConfig) -> KernelConfig:
        if kernels.engine != "graphs" or kernels.tilings or not self._tilings:
            return kernels
        return KernelConfig(kernels.experts, kernels.threads, kernels.engine, self._tilings)

    def _memory_bytes(self) -> int:
        """Of the device, beside the weights where it has its own."""
        weight = self._model.model.embed_tokens.weight
        if not weight.is_cuda:
            return memory_bytes()
        held = {p.data_ptr(): p.nbytes for p in self._model.parameters()}
        return int(torch.cuda.get_device_properties(weight.device).total_memory) - sum(held.values())


def _enough(samples: Sequence[float]) -> bool:
    return len(samples) >= STEPS or (len(samples) >= 3 and sum(samples) > _ENOUGH_SECONDS)
