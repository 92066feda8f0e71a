"""The user's own profiles: handed over as a file, kept, replaced and deleted. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from hardware.files import UserError, build_yaml, known
from hardware.profile import HardwareProfile, list_profiles, save_profile, user_folder

MOST_BYTES = 128 * 1024  # of a file that is handed over; one with a probe's curves takes 45 kB
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


def parse_profile(data: bytes, where: str) -> HardwareProfile:
    """The profile in a YAML file that somebody handed over; nothing is written. UserError: all faults in one.

    Stricter than `load_profile`: the name must do as a file's everywhere (`user_path`), and the file must be small.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"{where} must be of at most {MOST_BYTES:,} bytes, but is of {len(data):,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} must be UTF-8 text, but is not: {error}") from error
    profile = build_yaml(HardwareProfile, text, where)
    user_path(profile.name)
    return profile


def user_path(name: str) -> Path:
    """Where the user's own profile of that name lies. UserError unless the name does as a file's on every system."""
    reserved = name.split(".")[0].lower() in _RESERVED
    if not _STEM.fullmatch(name) or name.endswith((".yaml", ".yml", ".")) or reserved:
        raise UserError(
            f"name must be 1 to 64 letters, digits, dots, dashes or underscores, and no file's, but is {name!r:.80}",
            place=("name",),
        )
    return user_folder() / f"{name}.yaml"


def keep_profile(profile: HardwareProfile, *, replace: bool = False) -> Path:
    """Save a profile among the user's own. UserError: one of the name is there, unless it shall be replaced."""
    path = user_path(profile.name)
    if path.is_symlink() or (path.exists() and not replace):
        what = "a link, which is not written through" if path.is_symlink() else "a profile of yours already"
        raise UserError(f"{path} is {what}", place=("name",))
    return save_profile(profile, path)


def own_profiles() -> dict[str, Path]:
    """The user's own profiles by name, broken ones too."""
    folder = user_folder()
    return {name: path for name, path in list_profiles().items() if path.parent == folder}


def forget_profile(name: str) -> Path:
    """Delete one of the user's own profiles. UserError for any other name."""
    own = own_profiles()
    if name not in own:
        raise known("profile of yours", name, own)
    try:
        own[name].unlink()
    except OSError as error:
        raise UserError(f"cannot delete {own[name]}: {error.strerror or error}") from error
    return own[name]
