"""Trials on this machine with the real model."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.objective import Outputs
from autotune.space import Candidate
from hardware.fingerprint import memory_bytes
from runtime.bench import Identity
from runtime.bench_generation import GenerationSample, generation_record, sample_generation
from runtime.config import DTYPE_BYTES, KernelConfig, require
from runtime.conversion.tasks import Problem
from runtime.measurement import Measurement
from runtime.model.zaya import Zaya
from runtime.policy import using
from runtime.quality import disagreement, exact_match
from runtime.tokenizer import Tokenizer


class LocalRunner:
    """Decodes all prompts, `batch` at a time; one sample is a pass over all of them, so that samples are equal work.

    problems: where the prompts come from, if their answers can be checked. A pass counts decoding, not the prefill.
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
        self._warm: tuple[Candidate, Candidate] | None = None  # the settings that `pair` has warmed up

    def infeasible(self, candidate: Candidate) -> str | None:
        """Masks to draft with, positions, and memory for what a mode of running the experts copies."""
        config, (decoding, kernels) = self._model.config, candidate
        if decoding.drafts and config.mask_token_id is None:
            return f"{decoding.sampler} drafts with masks, but the model has no mask_token_id"
        needed = max(map(len, self._prompts)) + self._new_tokens
        if needed > config.max_position_embeddings:
            return f"prompt and new tokens need {needed} positions, but the model has {config.max_position_embeddings}"
        tokens = self._batch * decoding.slots
        copied = {"gather": tokens, "dense": config.num_experts}.get(kernels.expert_mode(tokens), 0)
        copied = copied if kernels.engine == "eager" else 0
        dtype = str(self._model.model.embed_tokens.weight.dtype).removeprefix("torch.")
        size = copied * 3 * config.hidden_size * config.moe_intermediate_size * DTYPE_BYTES[dtype]
        if size > memory_bytes() / 2:
            return f"the experts' copied weights need {size / 1e9:.1f} GB, more than half of the memory"
        return None

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        """Nothing yet: what kernels give wrong is seen by `quality`."""
        return {}

    def micro_benchmark(self, candidate: Candidate) -> float:
        """Mean step of the first batch of prompts."""
        found = self._sample(candidate, self._prompts[: self._batch])
        return found.seconds * candidate.decoding.forwards_per_step / found.forwards

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        """`repeats` passes."""
        samples = [self._sample(candidate, self._prompts) for _ in range(self._repeats)]
        record = generation_record(
            self._model,
            self._identity,
            self._prompts,
            candidate.decoding,
            samples,
            kernels=candidate.kernels,
            batch=self._batch,
            max_new_tokens=self._new_tokens,
        )
        return record, samples[0].outputs

    def quality(self, outputs: Outputs) -> dict[str, float]:
        """Judged with the default kernels: a wrong kernel must not be its own judge."""
        with using(self._model, KernelConfig(KernelConfig().experts)):
            found = {"divergence": disagreement(self._model, self._prompts, outputs)}
        if self._problems and self._tokenizer:
            texts = [self._tokenizer.decode(o) for o in outputs]
            found["exact_match"] = exact_match(self._problems, texts).value
        return found

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        """A pass of each; before the first round of two settings, an unrecorded batch of each."""
        if self._warm != (default, candidate):
            self._warm = default, candidate
            for setting in self._warm:
                self._sample(setting, self._prompts[: self._batch])
        first, second = (self._sample(setting, self._prompts).tokens_per_second for setting in (default, candidate))
        return first, second

    def close(self) -> None:
        """Nothing is held that outlives it."""

    def _sample(self, candidate: Candidate, prompts: list[list[int]]) -> GenerationSample:
        return sample_generation(
            self._model,
            prompts,
            candidate.decoding,
            kernels=candidate.kernels,
            batch=self._batch,
            max_new_tokens=self._new_tokens,
        )
