"""Captured graphs on a real GPU give what eager steps give there."""

from __future__ import annotations

import pytest
import torch

from runtime.config import DecodingConfig
from runtime.engine import generate
from runtime.engines import use_engine
from tests.interpreted_engine import CONFIG
from tests.models import noisy_model, random_ids
from tests.test_graphs import SETTINGS, warm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: graphs are captured there alone")
LIMITS = [9, 3, 12, 7, 10]


@pytest.mark.parametrize("batch", [None, 3], ids=["closed", "refilled"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoding", SETTINGS.values(), ids=SETTINGS)
def test_replayed_graphs_commit_the_eager_tokens(decoding: DecodingConfig, sampled: bool, batch: int | None) -> None:
    model = noisy_model(CONFIG).to("cuda").freeze()
    prompts = [row[: 2 + 3 * i].tolist() for i, row in enumerate(random_ids(5, 14, 40, seed=3))]
    settings = warm(decoding) if sampled else decoding
    found = {}
    for engine in ("eager", "graphs", "graphs"):  # the second time on the graphs of the first
        use_engine(model, engine)
        result = generate(model, prompts, settings, max_new_tokens=LIMITS, stop_tokens=[7], batch=batch, seed=4)
        assert found.setdefault("tokens", result.tokens) == result.tokens, engine
        counted = {kind: (c.forwards, c.slots, c.experts_per_layer()) for kind, c in result.counters.items()}
        assert found.setdefault("counters", counted) == counted, engine
