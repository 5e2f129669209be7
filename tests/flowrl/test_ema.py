"""The EMA schedule against its formula."""

import pytest

from flowrl.ema import Ema
from flowrl.errors import UserError


class Scalars:
    """A policy of one number; counts what is copied."""

    def __init__(self, current):
        self.sets = {"current": current}

    def copy_weights(self, source, target, decay=None):
        new = self.sets[source]
        self.sets[target] = new if decay is None else decay * self.sets[target] + (1 - decay) * new


def test_the_ramp_by_hand():
    ema = Ema(decay=0.9)
    assert [ema.decay_at(n) for n in (0, 1, 2)] == [1 / 10, 2 / 11, 3 / 12]
    assert ema.decay_at(80) == 81 / 90 == 0.9 and ema.decay_at(81) == 0.9 and ema.decay_at(79) < 0.9
    assert Ema(decay=0.9, ramp=False).decay_at(0) == 0.9


def test_three_steps_by_hand():
    policy, ema = Scalars(1.0), Ema(decay=0.15)
    ema.start(policy)
    values = []
    for current in (2.0, 4.0, 8.0):
        policy.sets["current"] = current
        assert ema.step(policy)
        values.append(policy.sets["ema"])
    # decays 0.1, then the bound 0.15 twice
    first = 0.1 * 1 + 0.9 * 2
    second = 0.15 * first + 0.85 * 4
    assert values == pytest.approx([first, second, 0.15 * second + 0.85 * 8])


def test_every_second_step_uses_the_count_of_optimizer_steps():
    policy, ema = Scalars(0.0), Ema(decay=0.9, every=2)
    ema.start(policy)
    policy.sets["current"] = 1.0
    assert [ema.step(policy) for _ in range(4)] == [False, True, False, True]
    # averaged at n = 1 (2/11) and n = 3 (4/13): the distance to 1 shrinks by those factors
    assert policy.sets["ema"] == pytest.approx(1 - (2 / 11) * (4 / 13))


def test_a_resumed_schedule_goes_on():
    straight, policy = Ema(every=3), Scalars(0.0)
    straight.start(policy)
    for _ in range(4):
        straight.step(policy)
    resumed = Ema(every=3)
    resumed.load_state_dict(straight.state_dict())
    assert [resumed.step(policy) for _ in range(3)] == [straight.step(policy) for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize("bad", [{"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}, {"every": 0}])
def test_bad_settings(bad):
    with pytest.raises(UserError, match=f"ema.{next(iter(bad))} is"):
        Ema(**bad)
