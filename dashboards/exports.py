"""What each engine gets of a study, as the files that would be written, and what it cannot be told. Streamlit-free."""

from __future__ import annotations

import io
import shlex
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from autotune.export import native
from autotune.export.policy import Policy, simulated
from autotune.export.targets import TARGETS, write
from dashboards.sources import ENVIRONMENT, Source, file_of
from dashboards.trials import setting_text
from hardware.files import UserError, read_yaml

if TYPE_CHECKING:
    from autotune.results import StudyResult, TrialRecord
    from autotune.tiling_results import TilingResult

_STAMP = (1980, 1, 1, 0, 0, 0)  # of every file in an archive: the same files are the same archive


@dataclass(frozen=True)
class ExportInfo:
    """What one target gives. refusal: why it gives nothing; then there are no files.

    simulated: what was not real of what the files say. picked: whether they hold a setting that was picked by hand.

    files: (name below the target's folder, text). not_carried: what the files of this engine cannot say of the
    settings. left_out: parts of the policy that they are not about. says: how the engine is started with them.
    """

    target: str
    engine: str
    loads: str
    file: str
    does: str
    refusal: str | None = None
    files: tuple[tuple[str, str], ...] = ()
    not_carried: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    simulated: str | None = None
    picked: bool = False


def export_info(target: str, policy: Policy) -> ExportInfo:
    """What `ridgepoint export` writes of a policy, read back from a folder that is gone afterwards.

    UserError for an unknown target, which `autotune.export.targets.write` names; a refusal of the policy is no error.
    """
    known = TARGETS.get(target)
    about = (target, known.engine, known.loads, known.file, known.does) if known else (target, "", "", "", "")
    with TemporaryDirectory(prefix="ridgepoint-export-") as folder:
        root = Path(folder) / "out"
        try:
            paths = write(target, policy, root / known.out if known else root)
        except UserError as error:
            if known is None:
                raise
            return ExportInfo(*about, refusal=str(error))
        base = root / known.out if known and (root / known.out).is_dir() else root
        files = tuple((path.relative_to(base).as_posix(), path.read_text(encoding="utf-8")) for path in paths)
        beside = [read_yaml(path) for path in paths if path.name.endswith(".provenance.yaml")]
    settings = [setting for document in beside for setting in document["settings"]]
    # The native file has no other beside it, but holds every setting; a table of step times holds no decision.
    holds_settings = bool(settings) or target == native.TARGET.name
    of = simulated([*policy.studies, *(policy.tilings if target == native.TARGET.name else ())])
    return ExportInfo(
        *about,
        files=files,
        not_carried=_all(setting["not_carried"] for setting in settings),
        left_out=_all(document["left_out"] for document in beside),
        says=_all(document["says"] for document in beside),
        simulated="; ".join(d["simulated"] for d in beside if d["simulated"]) or None if beside else of,
        picked=holds_settings and any(chosen.by_hand for chosen in policy.chosen()),
    )


def _all(parts: Any) -> tuple[str, ...]:
    """Lines of several lists, each once."""
    return tuple(dict.fromkeys(line for part in parts for line in part))


def download(info: ExportInfo) -> tuple[str, bytes, str]:
    """(file name, content, media type): one file as it is, several as an archive that unpacks into a folder."""
    if len(info.files) == 1:
        ((name, text),) = info.files
        return Path(name).name, text.encode(), "text/plain"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(info.files):
            entry = zipfile.ZipInfo(f"{info.target}/{name}", _STAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return f"{info.target}.zip", stream.getvalue(), "application/zip"


def command(source: Source, target: str, batch: int | None = None, context: int | None = None) -> str:
    """The command that writes the same files; a database's password is not in it."""
    place = f'"{ENVIRONMENT}"' if source.name == ENVIRONMENT else shlex.quote(_place(source))
    words = ["ridgepoint export", f"--format {target}", f"--study {place}"]
    words += [f"--{name} {value}" for name, value in (("batch", batch), ("context", context)) if value is not None]
    return " ".join([*words, f"--out {TARGETS[target].out}"])


def _place(source: Source) -> str:
    """Where the source lies, as a command that is started beside the dashboard can be told."""
    path = file_of(source)
    if path is None:
        return source.shown
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# --- what is chosen


def policy_of(
    source: Source,
    studies: Sequence[StudyResult],
    tilings: Sequence[TilingResult],
    target: str,
    *,
    batch: int | None = None,
    context: int | None = None,
    study: str = "",
    trial: int | None = None,
) -> Policy:
    """What the studies decided (of one batch or context), or one tried setting of one study. UserError names others."""
    if not study:
        return Policy(studies, tilings, command(source, target, batch, context)).select(batch, context)
    found = [s for s in studies if s.name == study]
    if not found:
        raise UserError(f"unknown study {study!r}; known: {', '.join(s.name for s in studies)}")
    if trial is None:
        raise UserError(f"choose a setting of study {study!r}")
    return Policy(found, tilings, f"trial {trial} of {study!r}, picked in `ridgepoint dashboard`", {study: trial})


def pickable(study: StudyResult) -> dict[int, str]:
    """The settings that can be exported, by trial: what was decided, then the front, then the fastest; in words."""
    decided = study.decision.trial if study.decision else None
    front = [t.number for t in study.front()]
    ranked = sorted(
        study.correct, key=lambda t: (t.number != decided, t.number not in front, -(t.tokens_per_second or 0))
    )
    return {t.number: _words(t, decided, t.number in front) for t in ranked}


def _words(trial: TrialRecord, decided: int | None, on_front: bool) -> str:
    role = "decided: " if trial.number == decided else "on the front: " if on_front else ""
    speed = f"{trial.tokens_per_second:,.1f} tokens/s" if trial.tokens_per_second is not None else ""
    return f"{role}trial {trial.number}, {speed}, divergence {trial.divergence or 0:.2%}, {setting_text(trial)}"
