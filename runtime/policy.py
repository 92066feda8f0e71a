"""Which settings decode: one fixed choice, or a tuned deployment's rules by active sequences and context."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from hardware.files import UserError
from hardware.fingerprint import differing, fingerprint, fingerprint_key
from runtime.checkpoint import model_hash
from runtime.config import DecodingConfig, KernelConfig, replace
from runtime.deployment import Deployment, Rule, load_deployment
from runtime.engines import engine_of
from runtime.model.zaya import Zaya

Settings: TypeAlias = DecodingConfig | Deployment | str | os.PathLike[str]


def rules_of(model: Zaya, decoding: Settings, *, ignore_mismatch: bool = False) -> tuple[Rule, ...]:
    """The rules to follow, with the threads that each will use. decoding: settings, a deployment, or its path.

    Fixed settings are one rule that holds everywhere, with the model's present kernels. UserError when a deployment
    was tuned for another model, or on another device or software, unless `ignore_mismatch`. One without a fingerprint
    (written by hand) was tuned nowhere and holds on any device.
    """
    threads = torch.get_num_threads()
    if isinstance(decoding, DecodingConfig):
        return (Rule(decoding, replace(model.kernels, threads=threads)),)
    deployment = decoding if isinstance(decoding, Deployment) else load_deployment(decoding)
    reason = None if ignore_mismatch else _mismatch(model, deployment)
    if reason is not None:
        raise UserError(f"this deployment was {reason}: --ignore-mismatch (ignore_mismatch=True) runs it in any case")
    return tuple(
        replace(rule, kernels=replace(rule.kernels, threads=rule.kernels.threads or threads))
        for rule in deployment.rules
    )


def device_of(model: Zaya) -> dict[str, Any]:
    """The fingerprint of where a model runs."""
    weight = model.model.embed_tokens.weight
    gpu = torch.cuda.get_device_name(weight.device) if weight.is_cuda else None
    found = fingerprint(gpu)
    if not weight.is_cuda:
        found["device"] = found["cpu"]  # the machine may have a GPU that this model does not use
    return found


def _mismatch(model: Zaya, deployment: Deployment) -> str | None:
    found, tuned = model_hash(model), deployment.fingerprint
    if deployment.model_hash != found:
        return f"tuned for {deployment.model} ({deployment.model_hash}), but the model is {found}"
    if not tuned:
        return None
    here = device_of(model)
    if fingerprint_key(tuned) == fingerprint_key(here):
        return None
    differ = [f"{name} {tuned.get(name)}, but here it is {here.get(name)}" for name in differing(tuned, here)]
    return f"tuned on {'; '.join(differ)}"


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
