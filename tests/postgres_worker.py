"""A worker of tests/test_postgres.py: tunes the made-up machine, and keeps a diary of what it was asked for."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from autotune.objective import Outputs
from autotune.space import Candidate, decoding_space, default_candidate
from autotune.study import tune
from hardware.files import UserError, plain
from runtime.measurement import Measurement
from tests.made_up import DEVICE, MadeUp, oracle, subject

PACE_SECONDS = 0.15
SPACE = decoding_space(batch=1, cores=1, lossless=True)  # a small one: what proposes settings is not tested here


class Diary(MadeUp):
    """The made-up machine at a pace, so that there is a middle of a trial. It hangs in its measurement `hang`."""

    def __init__(self, file: Path, hang: int) -> None:
        super().__init__()
        self.file, self.hang = file, hang

    def note(self, what: str, candidate: Candidate) -> None:
        with self.file.open("a") as file:
            file.write(f"{what} {SPACE.key(candidate)}\n")

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        self.note("checked", candidate)
        return super().numerics(candidate)

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        self.note("began", candidate)
        time.sleep(600 if len(self.measured) + 1 == self.hang else PACE_SECONDS)
        found = super().measure(candidate)
        self.note("measured", candidate)
        return found

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        self.note("paired", candidate)
        time.sleep(PACE_SECONDS)
        return super().pair(default, candidate)


def main(folder: Path, name: str, *, device: str, hang: int, together: int) -> int:
    """Wait for `together` workers, tune, print the study."""
    about = subject(device=DEVICE | {"device": device}, space=SPACE)
    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < together:
        time.sleep(0.02)
    runner = Diary(folder / f"{name}.diary", hang)
    try:
        result = tune(
            os.environ["STUDIES"],
            about,
            runner,
            default=default_candidate(SPACE, 1),
            predict=oracle,
            trials=12,
            worker=name,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(plain(result)))
    return 0


if __name__ == "__main__":
    folder, name, device, hang, together = sys.argv[1:]
    code = main(Path(folder), name, device=device, hang=int(hang), together=int(together))
    assert "torch" not in sys.modules
    sys.exit(code)
