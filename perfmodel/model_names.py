"""Published names of models, as tables and papers write them, as names of built-in models. Never by resemblance."""

from __future__ import annotations

# Built-in model -> other published names of a model with exactly its sizes (fine-tunes, later releases), lower case.
_ALIASES: dict[str, tuple[str, ...]] = {
    "dream-7b": ("dream-v0-base-7b", "dream-v0-instruct-7b"),
    "gemma-3-12b": ("gemma-3-12b-it",),  # as a language model: the vision tower runs once per image
    "gemma-3-27b": ("gemma-3-27b-it",),
    "gpt-oss-20b": (),
    "gpt-oss-120b": (),
    "llada-8b": ("llada-8b-base", "llada-8b-instruct"),
    "llada2.0-flash": ("llada2.0-flash-cap",),
    "llada2.0-mini": ("llada2.0-mini-cap",),
    "llama-2-7b": ("llama-2-7b-hf", "llama-2-7b-chat", "llama-2-7b-chat-hf"),
    "llama-2-13b": ("llama-2-13b-hf", "llama-2-13b-chat", "llama-2-13b-chat-hf"),
    "llama-2-70b": ("llama-2-70b-hf", "llama-2-70b-chat", "llama-2-70b-chat-hf"),
    # Llama 3 has the layers and vocabulary of 3.1; it was only trained on shorter contexts.
    "llama-3.1-8b": (
        *("llama-3.1-8b-instruct", "meta-llama-3.1-8b", "meta-llama-3.1-8b-instruct"),
        *("llama-3-8b", "llama-3-8b-instruct", "meta-llama-3-8b", "meta-llama-3-8b-instruct"),
    ),
    "llama-3.1-70b": (
        *("llama-3.1-70b-instruct", "meta-llama-3.1-70b", "meta-llama-3.1-70b-instruct"),
        *("llama-3.3-70b", "llama-3.3-70b-instruct"),
        *("llama-3-70b", "llama-3-70b-instruct", "meta-llama-3-70b", "meta-llama-3-70b-instruct"),
    ),
    "llama-3.1-405b": ("llama-3.1-405b-instruct", "meta-llama-3.1-405b", "meta-llama-3.1-405b-instruct"),
    "llama-3.2-1b": ("llama-3.2-1b-instruct",),
    "llama-3.2-3b": ("llama-3.2-3b-instruct",),
    "mistral-7b-v0.3": ("mistral-7b-instruct-v0.3",),
    "mixtral-8x7b": ("mixtral-8x7b-v0.1", "mixtral-8x7b-instruct-v0.1"),
    "mixtral-8x22b": ("mixtral-8x22b-v0.1", "mixtral-8x22b-instruct-v0.1"),
    "qwen2.5-7b": ("qwen2.5-7b-instruct",),
    "qwen2.5-32b": ("qwen2.5-32b-instruct", "qwq-32b"),
    "qwen2.5-72b": ("qwen2.5-72b-instruct",),
    "qwen3-4b": (),
    "qwen3-8b": ("qwen3guard-8b",),
    "qwen3-14b": (),
    "qwen3-32b": (),
    "qwen3-30b-a3b": (
        *("qwen3-30b-a3b-instruct-2507", "qwen3-30b-a3b-thinking-2507"),
        *("qwen3-coder-30b-a3b", "qwen3-coder-30b-a3b-instruct"),
    ),
    "qwen3-235b-a22b": ("qwen3-235b", "qwen3-235b-a22b-instruct-2507", "qwen3-235b-a22b-thinking-2507"),
    "qwen3-coder-480b-a35b": ("qwen3-coder-480b-a35b-instruct",),
    "sdar-8b": ("sdar-8b-chat", "sdar-8b-chat-b32", "sdar-8b-chat-b64"),
    "sdar-30b-a3b": ("sdar-30b-a3b-chat", "sdar-30b-a3b-chat-b32"),
    "zaya1-8b": ("zaya1-base", "zaya1-reasoning-base", "zaya1-8b-diffusion-preview"),
    "zaya1-74b-preview": (),
}
_BY_NAME = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases)}
_OWNERS = (
    "meta-llama",
    "qwen",
    "mistralai",
    "openai",
    "gsai-ml",
    "dream-org",
    "inclusionai",
    "jetlm",
    "zyphra",
    "google",
    # Who publish the models of others in other element types.
    "nvidia",
    "redhatai",
    "neuralmagic",
    "amd",
)


def model_for(published_name: str) -> str | None:
    """The built-in model of a published name, None where none is known to have its sizes.

    Case, the owner before a slash, and a final -FP8 (the same sizes in another element type) are ignored; nothing else
    is, so that a name with a word more ("EAGLE", "Distill") is another model.
    """
    name = published_name.strip().lower()
    owner, slash, rest = name.rpartition("/")
    if slash:
        if owner not in _OWNERS:
            return None
        name = rest
    return _BY_NAME.get(name.removesuffix("-fp8"))


def built_in_names() -> frozenset[str]:
    """Every built-in model that has a published name; a test holds them equal to the files."""
    return frozenset(_ALIASES)
