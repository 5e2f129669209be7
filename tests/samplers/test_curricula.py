"""Windows, intervals and splits that move: against hand-made sequences and a counter that keeps a state."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers import Key, Window
from samplers.curricula import (
    backward,
    chosen_steps,
    moving_steps,
    ramp,
    scattered_steps,
    shallower,
    success_steps,
)


def starts(window, n, seed=0):
    return [window.start(update, seed) for update in range(n)]


def test_progressive_by_hand():
    window = Window(2, high=5, every=2)
    assert starts(window, 10) == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert starts(Window(2, high=5, every=2, at_end="stop"), 10) == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert starts(Window(2, high=7, low=1, every=1, stride=2), 5) == [1, 3, 5, 1, 3]
    assert starts(Window(2, high=6, low=1, every=1, stride=2), 5) == [1, 3, 1, 3, 1]  # 5 would not fit
    assert window.steps(3) == (1, 3)


def test_published_windows():
    tree_grpo = Window(4, high=10, every=50)
    assert len(tree_grpo.positions) == 7 and tree_grpo.start(299) == 5  # 300 epochs see six of them
    mix = Window(4, high=23, every=25)
    assert [mix.start(u) for u in (0, 24, 25, 19 * 25 + 24, 20 * 25)] == [0, 0, 1, 19, 0]
    flash_star = Window(4, high=23, move="frozen")
    assert starts(flash_star, 100) == [0] * 100
    # the paper's interval: ceil(25 exp(-0.1 max(0, l - 13)))
    decaying = Window(4, high=23, every=25, decay=0.1)
    assert [decaying.interval(l) for l in (0, 13, 14, 19)] == [25, 25, 23, 14]


class Counter:
    """The published bookkeeping, update by update: MixGRPO's progressive and exponentially decaying strategies."""

    def __init__(self, window):
        self.window, self.at, self.spent = window, window.low, 0

    def next(self):
        w, now = self.window, self.at
        self.spent += 1
        if self.spent >= math.ceil(w.every * math.exp(-w.decay * max(0, self.at - w.decay_from))):
            self.at, self.spent = self.at + w.stride, 0
            if self.at + w.size > w.high:
                self.at = w.low if w.at_end == "restart" else now
        return now


@given(
    size=st.integers(1, 4),
    low=st.integers(0, 4),
    room=st.integers(0, 9),
    every=st.integers(1, 6),
    stride=st.integers(1, 4),
    at_end=st.sampled_from(["restart", "stop"]),
    decay=st.sampled_from([0.0, 0.1, 0.7]),
    decay_from=st.integers(0, 8),
)
def test_is_the_counter_without_a_state(size, low, room, **settings):
    window = Window(size, high=low + size + room, low=low, **settings)
    counter = Counter(window)
    assert starts(window, 120) == [counter.next() for _ in range(120)]


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 9), st.integers(0, 99))
def test_random_windows_cover_their_range(size, low, room, seed):
    window = Window(size, high=low + size + room, low=low, move="random")
    found = starts(window, 40 * (room + 1), seed)
    assert set(found) == set(range(low, low + room + 1))
    # the draw is the keyed integer over the range, so that it is the same everywhere
    assert found[7] == Key(seed, "window", 7, "", 0, None).integer(low, low + room + 1)


def test_backward_is_the_published_staircase():
    # the script: split step 14 + i * 7 // 100 of stage i
    assert [backward(i, 100, 14, 20) for i in range(100)] == [14 + i * 7 // 100 for i in range(100)]
    assert backward(100, 100, 14, 20) == backward(10**6, 100, 14, 20) == 20


@given(st.integers(1, 50), st.integers(1, 10), st.integers(0, 10), st.integers(0, 200))
def test_backward_grows_from_first_to_last(updates, first, more, update):
    now, after = (backward(update + i, updates, first, first + more) for i in (0, 1))
    assert first <= now <= after <= first + more
    assert backward(0, updates, first, first + more) == first


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.integers(0, 30))
def test_moving_steps_rise(pairs, update):
    early = [sum(a for a, _ in pairs[: i + 1]) + i for i in range(len(pairs))]
    late = [sum(b for _, b in pairs[: i + 1]) + i for i in range(len(pairs))]
    steps = moving_steps(update, 20, early, late)
    assert list(steps) == sorted(set(steps))
    assert moving_steps(0, 20, early, late) == tuple(early) and moving_steps(20, 20, early, late) == tuple(late)
    assert all(min(a, b) <= s <= max(a, b) for a, s, b in zip(early, steps, late, strict=True))


def test_published_splits_and_depths():
    assert [moving_steps(i, 10, (1, 2, 3), (1, 3, 5)) for i in (0, 4, 5, 10)] == [
        (1, 2, 3),
        (1, 2, 4),
        (1, 3, 4),
        (1, 3, 5),
    ]
    depths = (15, 16, 17, 18)
    assert shallower(29, depths, 30, 13) == depths
    assert shallower(30, depths, 30, 13) == (14, 15, 16, 17)
    assert shallower(300, depths, 30, 13) == (13, 14, 15, 16)


def test_refused_with_the_numbers():
    cases = [
        (lambda: Window(5, high=4), r"size 5 in the steps \[0, 4\); expected 1 <= size <= 4"),
        (lambda: Window(0, high=4), "size 0"),
        (lambda: Window(2, high=4, low=3), r"size 2 in the steps \[3, 4\)"),
        (lambda: Window(2, high=4, low=-1), "size 2"),
        (lambda: Window(2, high=4, every=0), "every 0"),
        (lambda: Window(2, high=4, stride=0), "stride 0"),
        (lambda: Window(2, high=4, decay=-1.0), "decay -1.0"),
        (lambda: Window(2, high=4, move="backwards"), "move 'backwards'; expected one of"),
        (lambda: Window(2, high=4, at_end="fail"), "at_end 'fail'"),
        (lambda: backward(0, 10, 5, 4), "first 5, last 4"),
        (lambda: moving_steps(0, 10, (2, 1), (3, 4)), r"early \[2, 1\] and late \[3, 4\]; expected early to rise"),
        (lambda: moving_steps(0, 10, (1, 2), (3,)), r"late \[3\]"),
        (lambda: shallower(0, (5, 6), 30, 7), "stop 7"),
        (lambda: shallower(0, (), 30, 0), r"depths \[\]"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


# ------------------------------------------------------------------------------------------------- drawn and decaying
@pytest.mark.parametrize(
    ("size", "high", "every", "stride"), [(4, 23, 25, 1), (4, 23, 20, 1), (2, 9, 10, 2), (1, 5, 7, 1)]
)
def test_the_stay_falls_in_a_straight_line(size, high, every, stride):
    """MixGRPO's other way to decay: int(most (1 - p) + least p) with p = start / steps, from every to every // 4."""
    least = max(1, every // 4)
    window = Window(size, high=high, every=every, stride=stride, least=least)
    for start in window.positions:
        exact = every + (least - every) * start / high
        assert window.interval(start) == math.floor(exact + 1e-9) >= least
    intervals = [window.interval(start) for start in window.positions]
    assert intervals[0] == every and intervals == sorted(intervals, reverse=True)
    seen = starts(window, sum(intervals) + 1)
    assert [seen.count(start) for start in window.positions][1:] == intervals[1:] and seen[-1] == 0


KEY = Key(3, "splits", 0, "", 0, None)


@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 20), st.integers(1, 4), st.floats(0, 1), st.data())
def test_drawn_splits_keep_their_distance(count, low, room, gap, success, data):
    high = low + (count - 1) * gap + room
    places = data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    key = KEY._replace(update=data.draw(st.integers(0, 999)))
    for steps in (
        scattered_steps(places, 6.0, low, high, gap, key),
        success_steps(count, success, 4.0, low, high, gap, key),
    ):
        assert len(steps) == count and low <= steps[0] and steps[-1] <= high
        assert all(b - a >= gap for a, b in zip(steps, steps[1:], strict=False))
    assert scattered_steps(places, 6.0, low, high, gap, key) == scattered_steps(places, 6.0, low, high, gap, key)


def test_draws_have_the_moments_of_their_beta_distributions():
    """One split each, so that none moves another: mean and variance of 2000 draws against the closed forms."""
    keys = [KEY._replace(update=i) for i in range(2000)]
    found = torch.tensor([scattered_steps([40], 6.0, 0, 100, 1, key)[0] for key in keys]).double()
    assert found.mean() == pytest.approx(40, abs=1.6)  # std 18.5 / sqrt(2000) = 0.41
    assert found.var() == pytest.approx(100**2 * 0.4 * 0.6 / 7, rel=0.15)
    for success, mean in ((0.0, 5 / 6), (0.5, 1 / 2), (1.0, 1 / 6)):  # (1 + (1 - a) 4) / (2 + 4)
        found = torch.tensor([success_steps(1, success, 4.0, 0, 1000, 1, key)[0] for key in keys]).double()
        assert found.mean() == pytest.approx(1000 * mean, abs=20)
        assert found.var() == pytest.approx(1000**2 * mean * (1 - mean) / 7, rel=0.2)


def test_chosen_steps_are_a_uniform_subset():
    draws = [chosen_steps(update, 0, 9, 15) for update in range(1000)]
    assert all(len(set(steps)) == 9 and list(steps) == sorted(steps) for steps in draws)
    counts = [sum(step in steps for steps in draws) for step in range(15)]
    assert max(abs(count - 600) for count in counts) < 70  # std 15.5
    both = sum(0 in steps and 14 in steps for steps in draws)
    assert both == pytest.approx(1000 * (9 * 8) / (15 * 14), abs=65)  # without replacement
    assert draws[:50] == [chosen_steps(update, 0, 9, 15) for update in range(50)]
    assert draws[:50] != [chosen_steps(update, 1, 9, 15) for update in range(50)]
    assert chosen_steps(3, 0, 4, 4) == (0, 1, 2, 3)


def test_ramp_by_hand():
    assert [ramp(update, 0.8, 2.0, 150) for update in (0, 75, 150, 900)] == pytest.approx([0.8, 1.4, 2.0, 2.0])


def test_draws_are_refused_with_the_numbers():
    cases = [
        (lambda: Window(2, high=9, every=8, least=9), "least 9; expected 1 to 8"),
        (lambda: Window(2, high=9, every=8, least=2, decay=0.1), "least 2 beside decay 0.1"),
        (
            lambda: scattered_steps([1, 2, 3], 6.0, 1, 4, 2, KEY),
            r"3 steps, 2 apart, in \[1, 4\]; expected .*at least 5",
        ),
        (lambda: success_steps(2, 1.5, 4.0, 0, 9, 1, KEY), "success 1.5"),
        (lambda: scattered_steps([1], 0.0, 0, 4, 1, KEY), "concentration 0"),
        (lambda: chosen_steps(0, 0, 5, 4), "5 of 4 steps"),
        (lambda: ramp(0, 1.0, 2.0, 0), "over 0"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
