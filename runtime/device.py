"""The device that a command names. Torch loads late, and no command line is needed: runners use it too."""

from __future__ import annotations

from hardware.files import UserError, known
from runtime.config import require


def check_device(device: str, threads: int | None) -> None:
    """Refuse an impossible device name or thread count, without torch."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise known("device", device, ("cpu", "cuda", "cuda:N"))
    require(threads is None or threads >= 1, f"threads >= 1 must hold, but got {threads}")


def use_device(device: str, threads: int | None) -> None:
    """Refuse a device that is not there, and set the threads."""
    import torch

    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {device}: torch sees {torch.cuda.device_count()} CUDA or ROCm devices here")
    if threads is not None:
        torch.set_num_threads(threads)
