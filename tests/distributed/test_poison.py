"""The bench's section of poisoned runs, a tenth of it."""

import pytest

from hdet.bench.faults import poison


@pytest.mark.parametrize("seed", [0])
def test_what_is_not_finite_is_never_silent(seed):
    outcome = poison.run(0.1, seed)
    assert outcome.tried == 30
    assert outcome.failures == []
