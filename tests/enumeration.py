"""A sampler's distribution by enumeration: all outcomes of a few tokens, and Pearson's chi-square of the counts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.stats import chi2

from runtime.config import DecodingConfig, replace
from runtime.engine import generate
from runtime.model.zaya import Zaya

DRAWS = 10_000
RIGHT, WRONG = 1e-6, 1e-12  # a right sampler's p-value lies above the first (false alarms: 1e-6), a wrong one's below


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's chi-square of the counts; outcomes expected fewer than five times are one outcome."""
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 5
    merged = [(counts[~rare], expected[~rare]), (counts[rare].sum(keepdims=True), expected[rare].sum(keepdims=True))]
    observed, wanted = (np.concatenate(x) for x in zip(*[m for m in merged if m[1].sum() > 0], strict=True))
    return float(chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1))


@dataclass(frozen=True)
class Enumeration:
    """Every outcome of `new_tokens` tokens after a prompt, at one temperature."""

    model: Zaya
    prompt: tuple[int, ...]
    new_tokens: int
    temperature: float

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of the outcomes in counting order, from causal logits."""
        outcomes = list(itertools.product(range(self.model.config.vocab_size), repeat=self.new_tokens))
        with torch.no_grad():
            logits = self.model.logits(torch.tensor([[*self.prompt, *outcome] for outcome in outcomes]))
        rows = torch.log_softmax(logits[:, len(self.prompt) - 1 : -1].double() / self.temperature, -1)
        return rows.gather(-1, torch.tensor(outcomes)[:, :, None]).sum((1, 2)).exp().numpy()

    def p_value(self, decoding: DecodingConfig, *, seed: int = 0, draws: int = DRAWS, at_once: int = DRAWS) -> float:
        """Of what `draws` sequences decoded, `at_once` together. The temperature is the enumeration's unless set."""
        if decoding.temperature == 0:
            decoding = replace(decoding, temperature=self.temperature)
        rows: list[list[int]] = []
        while len(rows) < draws:
            prompts = [self.prompt] * min(at_once, draws - len(rows))
            new = self.new_tokens
            rows += generate(
                self.model, prompts, decoding, max_new_tokens=new, stop_tokens=(), seed=seed + len(rows)
            ).tokens
        places = self.model.config.vocab_size ** np.arange(self.new_tokens)[::-1]
        return p_value(np.bincount(np.array(rows) @ places, minlength=len(self.probabilities)), self.probabilities)
