"""Which settings decode: one fixed choice, or a tuned deployment's rules by active sequences and context."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch

from hardware.files import UserError
from runtime.checkpoint import model_hash
from runtime.config import DecodingConfig, KernelConfig, replace
from runtime.deployment import Deployment, Rule, load_deployment
from runtime.engines import engine_of
from runtime.model.zaya import Zaya

Settings: TypeAlias = DecodingConfig | Deployment | str | os.PathLike[str]


def rules_of(model: Zaya, decoding: Settings) -> tuple[Rule, ...]:
    """The rules to follow, with the threads that each will use. decoding: settings, a deployment, or its path.

    Fixed settings are one rule that holds everywhere, with the model's present kernels. UserError when a deployment
    was tuned for another model.
    """
    threads = torch.get_num_threads()
    if isinstance(decoding, DecodingConfig):
        return (Rule(decoding, replace(model.kernels, threads=threads)),)
    deployment = decoding if isinstance(decoding, Deployment) else load_deployment(decoding)
    found = model_hash(model)
    if deployment.model_hash != found:
        raise UserError(
            f"this deployment was tuned for {deployment.model} ({deployment.model_hash}), but the model is {found}"
        )
    return tuple(
        replace(rule, kernels=replace(rule.kernels, threads=rule.kernels.threads or threads))
        for rule in deployment.rules
    )


@contextmanager
def using(model: Zaya, kernels: KernelConfig | None = None) -> Iterator[KernelConfig]:
    """Run with these kernel settings (None: the present ones) and put the old ones back, whatever changed or failed.

    Yields what is in use.
    """
    before, threads = model.kernels, torch.get_num_threads()
    try:
        if kernels is not None:
            apply_kernels(model, kernels)
        yield replace(model.kernels, threads=torch.get_num_threads())
    finally:
        apply_kernels(model, replace(before, threads=threads))
        model.kernels = before


def apply_kernels(model: Zaya, kernels: KernelConfig) -> None:
    """Use the engine, experts and threads that a kernel configuration says. UserError for an engine not to be had."""
    if kernels.engine != model.kernels.engine:
        engine_of(model, kernels.engine)
    model.kernels = kernels
    if kernels.threads is not None and kernels.threads != torch.get_num_threads():
        torch.set_num_threads(kernels.threads)
