"""What a million tokens cost in energy and money: estimates from a profile's TDP and price, never measurements.

TDP is an upper estimate of a device's power: memory-bound decoding draws less. Hosts, cooling, idle time and the
prompt's tokens are not counted. A price is what the profile's source charged for a device-hour on its day.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile

TOKENS = 1e6
SECONDS_PER_HOUR = 3600.0
BASIS = "estimates: joules from the TDP (an upper estimate of power), dollars from the profile's price per device-hour"


@dataclass(frozen=True)
class Economics:
    """Per million generated tokens, of all devices together; None where the profile has no TDP or no price."""

    joules_per_million_tokens: npt.NDArray[np.float64] | None
    dollars_per_million_tokens: npt.NDArray[np.float64] | None


def economics(hardware: HardwareProfile, tokens_per_second: npt.ArrayLike, devices: int = 1) -> Economics:
    """Energy and money for `tokens_per_second` (a number or an array) from `devices` devices kept at that rate."""
    seconds = TOKENS / np.asarray(tokens_per_second, dtype=float)
    watts, price = hardware.tdp_watts, hardware.price_dollars_per_hour
    return Economics(
        joules_per_million_tokens=None if watts is None else devices * watts * seconds,
        dollars_per_million_tokens=None if price is None else devices * price * seconds / SECONDS_PER_HOUR,
    )
