"""Which compute type is faster on this CPU."""

from __future__ import annotations

import pytest

from sra_fast.tuning import precision
from sra_fast.tuning.precision import advice, bf16_speed
from sra_fast.tuning.timing import Samples


@pytest.mark.parametrize(
    ("fp32_ms", "bf16_ms", "for_fp32", "for_bf16"),
    [
        (3.0, 1.0, "bf16 products are 3.0 x as fast here: --train.precision bf16", ""),
        (1.0, 2.0, "", "fp32 products are 2.0 x as fast here: --train.precision fp32"),
        (1.0, 1.1, "", ""),
    ],
)
def test_the_faster_type_is_named_to_those_who_use_the_other(monkeypatch, fp32_ms, bf16_ms, for_fp32, for_bf16):
    times = {"fp32": Samples(ms=(fp32_ms,)), "bf16": Samples(ms=(bf16_ms,))}
    monkeypatch.setattr(precision, "measure", lambda calls, **_: {name: times[name] for name in calls})
    bf16_speed.cache_clear()
    assert (advice("fp32"), advice("bf16")) == (for_fp32, for_bf16)
    bf16_speed.cache_clear()


def test_it_is_measured():
    bf16_speed.cache_clear()
    assert 0.001 < bf16_speed() < 1000
