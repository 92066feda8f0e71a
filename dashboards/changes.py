"""What would change an operating point most, and the acceptance it stands on: figures of both. Streamlit-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dashboards.style import BLUE, GREY, PALETTE, PATTERN, base_figure, safe
from perfmodel.explain import Explanation

PATTERNS = ("", "/", "x", ".", "-", "+")  # repeat what the colours say


@dataclass(frozen=True)
class Effect:
    """What a change does on one device to tokens per second and to the speedup over autoregressive decoding.

    Of a sensitivity: per cent for one per cent more of it. Of a whole change: shares gained (0.5: half as much again).
    """

    device: str
    name: str
    tokens_per_second: float
    speedup: float


@dataclass(frozen=True)
class EffectsInfo:
    """Effects by device, those that do most on any of them first; `refused`: what cannot be, and why, in words."""

    effects: tuple[Effect, ...]
    refused: tuple[str, ...] = ()

    def columns(self, unit: str) -> dict[str, list[Any]]:
        """One row an effect; `unit` ends the names of the columns with numbers."""
        return {
            "hardware": [e.device for e in self.effects],
            "change": [e.name for e in self.effects],
            f"tokens_per_second_{unit}": [e.tokens_per_second for e in self.effects],
            f"speedup_{unit}": [e.speedup for e in self.effects],
        }


def sensitivity_info(found: Mapping[str, Explanation]) -> EffectsInfo:
    """What one per cent more of each quantity does, in per cent."""
    effects = [
        Effect(device, s.name, s.elasticity, s.speedup_elasticity)
        for device, e in found.items()
        for s in e.sensitivities
    ]
    return EffectsInfo(_strongest_first(effects, abs))


def change_info(found: Mapping[str, Explanation]) -> EffectsInfo:
    """What whole changes do, as shares gained, and which cannot be made."""
    effects = [
        Effect(device, c.name, c.tokens_per_second_ratio - 1, c.speedup_ratio - 1)
        for device, e in found.items()
        for c in e.changes
    ]
    refused: dict[tuple[str, str], list[str]] = {}
    for device, e in found.items():
        for reason in e.refused.items():
            refused.setdefault(reason, []).append(device)
    words = tuple(f"Not possible on {' and '.join(on)}: {name} ({why})." for (name, why), on in refused.items())
    return EffectsInfo(_strongest_first(effects, lambda gain: max(1 + gain, 1 / (1 + gain))), words)


def sensitivity_plot(info: EffectsInfo) -> go.Figure:
    """Bars: per cent of tokens per second for one per cent more."""
    return _bars(info, "change of tokens/s (%) for 1% more of it", 1.0, "+.2f")


def change_plot(info: EffectsInfo) -> go.Figure:
    """Bars: per cent of tokens per second gained or lost."""
    return _bars(info, "change of tokens/s (%)", 100.0, "+.0f")


def _strongest_first(effects: Sequence[Effect], size: Callable[[float], float]) -> tuple[Effect, ...]:
    most: dict[str, float] = {}
    for e in effects:
        most[e.name] = max(most.get(e.name, 0.0), size(e.tokens_per_second))
    return tuple(sorted(effects, key=lambda e: -most[e.name]))  # stable: the devices keep their order


def _bars(info: EffectsInfo, title: str, factor: float, form: str) -> go.Figure:
    figure = base_figure(title, "")
    devices = list(dict.fromkeys(e.device for e in info.effects))
    for n, device in enumerate(devices):
        own = [e for e in info.effects if e.device == device]
        figure.add_bar(
            y=[safe(e.name) for e in own],
            x=[e.tokens_per_second * factor for e in own],
            orientation="h",
            name=safe(device),
            marker={
                "color": PALETTE[n % len(PALETTE)],
                "pattern": {**PATTERN, "shape": PATTERNS[n % len(PATTERNS)]},
            },
            text=[f"{e.tokens_per_second * factor:{form}}%" for e in own],
            textposition="outside",
            cliponaxis=False,
            customdata=[f"tokens/s {e.tokens_per_second * factor:{form}}%, speedup over autoregressive "
                        f"{e.speedup * factor:{form}}%" for e in own],
            hovertemplate="%{y}: %{customdata}<extra>" + safe(device) + "</extra>",
        )  # fmt: skip
    names = dict.fromkeys(e.name for e in info.effects)
    figure.update_layout(barmode="group", height=150 + len(names) * max(24, 18 * len(devices)), showlegend=True)
    figure.update_layout(legend={"y": -60 / (40 + len(names) * 24)}, margin={"r": 60})
    figure.update_xaxes(zeroline=True, zerolinecolor=GREY)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


@dataclass(frozen=True)
class AcceptedInfo:
    """The share of steps that accept 0 .. K fresh drafts, and the tokens that a step commits for it."""

    name: str
    shares: tuple[float, ...]
    tokens_per_step: float

    def columns(self) -> dict[str, list[Any]]:
        """One row a count."""
        return {"accepted_drafts": list(range(len(self.shares))), "share_of_steps": list(self.shares)}


def accepted_info(name: str, shares: Sequence[float], tokens_per_step: float) -> AcceptedInfo:
    """An acceptance histogram in shares, whatever it counts."""
    whole = sum(shares)
    return AcceptedInfo(name, tuple(share / whole for share in shares), tokens_per_step)


def accepted_plot(info: AcceptedInfo) -> go.Figure:
    """A small bar figure; it fits a sidebar."""
    figure = base_figure("fresh drafts accepted in a step", "share of steps (%)")
    figure.add_bar(
        x=list(range(len(info.shares))),
        y=[100 * share for share in info.shares],
        marker={"color": BLUE},
        name=safe(info.name),
        hovertemplate="%{x} accepted: %{y:.1f}% of steps<extra>" + safe(info.name) + "</extra>",
    )
    figure.update_layout(height=220, margin={"l": 45, "r": 5, "t": 25, "b": 45}, showlegend=False, font={"size": 11})
    return figure
