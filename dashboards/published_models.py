"""Published speeds of diffusion language models, with their sources: a table, nothing of it predicted."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from dashboards.pairs import NO_CHECKOUT
from hardware.files import UserError
from perfmodel.published.evidence import FOLDER
from perfmodel.published.rows import number
from runtime.config import require

MODELS = "diffusion_models.csv"
COLUMNS = tuple("id model hardware dtype engine batch task metric value unit source_url notes".split())
FAMILIES: dict[str, str] = {  # how a family's models are named
    "LLaDA": r"\bLLaDA-(8B|MoE|LLaDA)|-LLaDA\b",
    "Dream": r"\bDream\b",
    "Mercury": r"\bMercury\b",
    "Gemini Diffusion": r"\bGemini Diffusion\b",
    "SDAR": r"\bSDAR\b",
    "LLaDA2.x": r"\bLLaDA2",
    "TiDAR": r"\bTiDAR\b",
    "DiffusionGemma": r"\bDiffusionGemma\b",
}
SPEEDS = {  # whose tokens a rate counts
    "decode_tokens_per_s": "of one sequence",
    "decode_tokens_per_s_per_user": "of one sequence",
    "output_tokens_per_s_total": "of all sequences together",
}
NONE_FOUND = "none found"


@dataclass(frozen=True)
class ModelRow:
    """One published figure. tokens_per_second counts the tokens that `counted` names; None: the figure is another."""

    family: str
    id: str
    model: str
    tokens_per_second: float | None
    counted: str
    tokens_per_forward: float | None
    device: str
    batch: str
    task: str
    engine: str
    source_url: str
    notes: str


@dataclass(frozen=True)
class ModelsInfo:
    """Rows by family, and the families for which no figure of a kind was found."""

    rows: tuple[ModelRow, ...]
    without_speed: tuple[str, ...]
    without_tokens_per_forward: tuple[str, ...]


def models_info(folder: Path = FOLDER) -> ModelsInfo:
    """The figures of diffusion models in the published tables. UserError: no checkout, or a broken table."""
    require((folder / MODELS).is_file(), NO_CHECKOUT)
    lines = _lines(folder / "gpu_measured.csv", None)
    found = [{**line, "model": line["model_or_op"], "task": line["context_or_shape"]} for line in lines]
    found = [line for line in found if line["kind"] == "D"] + _lines(folder / MODELS, COLUMNS)
    rows = [row for family in FAMILIES for line in found if (row := _row(family, line)) is not None]
    fast = {row.family for row in rows if row.tokens_per_second is not None}
    counted = {row.family for row in rows if row.tokens_per_forward is not None}
    return ModelsInfo(
        tuple(rows),
        tuple(family for family in FAMILIES if family not in fast),
        tuple(family for family in FAMILIES if family not in counted),
    )


def _lines(path: Path, columns: tuple[str, ...] | None) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True, restval="")
            names = tuple(reader.fieldnames or ())
            wanted = columns or names
            require(names == wanted, f"{path.name} must have the columns {', '.join(wanted)}")
            return [{name: line[name].strip() for name in names} for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path.name}: {error}") from error


def _row(family: str, line: dict[str, str]) -> ModelRow | None:
    """The line as a row of a family, None where it is another's or no such figure."""
    metric, value = line["metric"], number(line["value"])
    if not re.search(FAMILIES[family], line["model"]) or value is None:
        return None
    if metric not in SPEEDS and metric != "tokens_per_forward":
        return None
    return ModelRow(
        family=family,
        id=line["id"],
        model=line["model"],
        tokens_per_second=value if metric in SPEEDS else None,
        counted=SPEEDS.get(metric, ""),
        tokens_per_forward=value if metric == "tokens_per_forward" else None,
        device=line["hardware"],
        batch=line["batch"],
        task=line["task"],
        engine=line["engine"],
        source_url=line["source_url"],
        notes=line["notes"],
    )


def models_columns(info: ModelsInfo) -> dict[str, list[object]]:
    """The rows as the columns of a table, with a row that says so for a family without any figure."""
    names = (
        "family model tokens_per_second counted tokens_per_forward device batch task engine id source_url notes".split()
    )
    columns: dict[str, list[object]] = {name: [getattr(row, name) for row in info.rows] for name in names}
    for family in set(info.without_speed) & set(info.without_tokens_per_forward):
        for name in names:
            texts = {"family": family, "model": NONE_FOUND}
            columns[name].append(texts.get(name, None if name.startswith("tokens_per") else ""))
    return columns
