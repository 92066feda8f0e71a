"""Checkpoints in the Hugging Face layout: config.json and one safetensors file or many with an index."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from hardware.files import UserError, known, plain, read_json, write_atomic
from runtime.config import DType, ModelConfig, model_config_from_json
from runtime.engines import use_engine
from runtime.model.moe import Router
from runtime.model.zaya import Zaya

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def bundled() -> dict[str, Path]:
    """The checkpoints that ship with the package, by name."""
    root = Path(str(files("runtime") / "checkpoints"))
    return {p.name: p for p in sorted(root.iterdir()) if (p / "config.json").is_file()} if root.is_dir() else {}


def find_checkpoint(path_or_name: str) -> Path:
    """The folder of a checkpoint, by path or by the name of a bundled one. UserError lists the known names."""
    path = Path(path_or_name)
    if (path / "config.json").is_file():
        return path
    if path_or_name in bundled():
        return bundled()[path_or_name]
    if path.is_dir():
        raise UserError(f"{path} holds no config.json, so it is no checkpoint")
    raise known("model", path_or_name, bundled())


def load_model(path_or_name: str, *, device: str = "cpu", dtype: DType = "float32", engine: str = "auto") -> Zaya:
    """Load a checkpoint for inference, which `engine` runs; auto: the fastest that can.

    Raises UserError for a missing, truncated or mismatched file, and for an engine that cannot run here.
    """
    folder = find_checkpoint(path_or_name)
    config = model_config_from_json(folder / "config.json")
    model = empty_model(config, device=device, dtype=dtype)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    missing = set(state)
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue
                    if name not in state:
                        raise UserError(f"{path}: unexpected tensor {name!r}")
                    tensor = shard.get_tensor(name)
                    if tensor.shape != state[name].shape:
                        raise UserError(
                            f"{path}: {name} must have shape {tuple(state[name].shape)}, but has {tuple(tensor.shape)}"
                        )
                    state[name].copy_(tensor)
                    missing.discard(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path} (truncated or not safetensors): {error}") from error
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, for example {sorted(missing)[0]!r}")
    return use_engine(model.freeze(), engine)


def empty_model(config: ModelConfig, *, device: str = "cpu", dtype: DType = "float32") -> Zaya:
    """A model whose parameters have no values yet. UserError when the device cannot hold it."""
    with torch.device("meta"):
        model = Zaya(config)
    model = model.to(getattr(torch, dtype))
    try:
        model = model.to_empty(device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or out of memory
        raise UserError(f"cannot hold the model on {device}: {str(error).splitlines()[0]}") from error
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False)


def random_model(config: ModelConfig, *, seed: int = 0, device: str = "cpu", dtype: DType = "float32") -> Zaya:
    """A model with random weights for training, or for timing an architecture whose weights are not at hand.

    Matrices are normal with variance 1 / fan-in, branch outputs smaller by sqrt(2 * layers); scales and key
    temperatures are 1. Results measured on it must be labelled simulated.
    """
    model = empty_model(config, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if "embed_tokens" in name:
            parameter.normal_(0, 0.05, generator=generator)
        elif parameter.dim() > 1:
            fan_in = parameter[0].numel() if parameter.dim() == 2 or "conv" in name else parameter.shape[-1]
            branch = (2 * config.num_hidden_layers) ** 0.5 if "o_proj" in name or leaf == "down_proj" else 1.0
            parameter.normal_(0, 1 / (branch * fan_in**0.5), generator=generator)
        else:
            parameter.fill_(0.0 if leaf.endswith("bias") else 1.0)
    for module in model.modules():
        if isinstance(module, Router):
            module.balancing_biases.zero_()[-1] = -1.0
    return model


def save_model(model: Zaya, folder: Path, *, dtype: DType | None = None) -> None:
    """Write config.json and model.safetensors, each under a temporary name first. dtype: the stored type of weights."""
    # A None is written too: left out, the reader would take the default for it (eos_token_id: 106).
    config = {k: v for k, v in plain(model.config).items() if v is not None or k != "mask_token_id"}
    stored = dtype or str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    config |= {"architectures": ["ZayaForCausalLM"], "model_type": "zaya", "hidden_act": "silu", "dtype": stored}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        kept = tensor if name.endswith("balancing_biases") else tensor.to(getattr(torch, stored))
        tensors[name] = kept.detach().cpu().contiguous()
    save_tensors(tensors, folder / WEIGHTS)
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, renamed into place. UserError when it cannot be written; the old file then stays."""
    write_atomic(path, serialize(tensors, metadata={"format": "pt", **(metadata or {})}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. UserError when it is truncated or no safetensors."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path} (truncated or not safetensors): {error}") from error


def model_hash(model: Zaya) -> str:
    """A short hash of configuration and weights: what a measurement or a deployment belongs to."""
    digest = hashlib.sha256(json.dumps(plain(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 4096)  # a sample: hashing 17 GB would take a minute
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    index: Any = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise UserError(f"{folder / INDEX}: weight_map must be a mapping, but is {index!r}")
    names = sorted(set(map(str, index.values())))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX}: shard {name!r} must lie in the checkpoint's folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which its index names")
    return [folder / name for name in names]
