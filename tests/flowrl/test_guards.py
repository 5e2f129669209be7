"""Alarms on made-up histories, non-finite stops, and real signals to real processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from flowrl.errors import GuardStop, UserError
from flowrl.guards import Alarms, Change, Limits, ScaleSkips, StopSignals, find_alarms, require_finite
from flowrl.statistics import Estimate

NAN, INF = float("nan"), float("inf")


# --- alarms -----------------------------------------------------------------------------------------------------------

RISE = {"reward/mean": Change(0.4, 0.1, 0.02)}


@pytest.mark.parametrize(
    ("name", "change", "alarms"),
    [
        ("judge/clip", Change(0.3, -0.05, 0.02), True),  # 2.5 standard errors
        ("judge/clip", Change(0.3, -0.03, 0.02), False),  # 1.5
        ("judge/clip", Change(0.3, 0.2, 0.02), False),  # rose too
        ("judge/clip", Change(0.3, -0.05, NAN), False),  # unknown spread: no evidence
        ("images/diversity", Change(0.5, -0.16, 0.01), True),  # -32 %
        ("images/diversity", Change(0.5, -0.14, 0.01), False),  # -28 %
        ("images/diversity", Change(0.5, -0.16, 0.10), False),  # noise
        ("images/diversity", Change(0.5, 0.4, 0.01), False),
        ("images/saturation", Change(0.4, 0.24, 0.01), True),  # +60 %
        ("images/saturation", Change(0.4, 0.16, 0.01), False),  # +40 %
        ("images/sharpness", Change(0.02, -0.012, 0.001), True),
        ("images/dark_fraction", Change(0.45, 0.48, 0.01), True),  # .45 -> .93, seen in a real run
        ("images/dark_fraction", Change(0.0, 0.0004, 0.00001), False),  # small against the floor
        ("lr", Change(1.0, -0.9, 0.0), False),
    ],
)
def test_limits(name, change, alarms):
    found = find_alarms({**RISE, name: change}, Limits())
    assert list(found) == ([name] if alarms else [])
    # the same movement without a rise of the reward is no alarm
    for reward in (Change(0.4, 0.03, 0.02), Change(0.4, -0.1, 0.02), Change(0.4, 0.1, NAN)):
        assert find_alarms({"reward/mean": reward, name: change}, Limits()) == {}
    assert find_alarms({name: change}, Limits()) == {}


def test_a_sentence_says_what_moved():
    (text,) = find_alarms({**RISE, "judge/clip": Change(0.3, -0.1, 0.02)}, Limits()).values()
    assert "reward rose from 0.4 to 0.5" in text and "judge clip fell from 0.3 to 0.2" in text


def test_change_of_two_windows_by_hand():
    # means 2 and 5, sample variances 1 and 4, three values each
    change = Change.between([1.0, NAN, 2.0, 3.0], [3.0, 5.0, 7.0])
    assert (change.before, change.diff) == (2, 3) and change.error == pytest.approx(math.sqrt(1 / 3 + 4 / 3))
    assert Change.between([1.0, NAN], [1.0, 2.0]) is None
    paired = Change.paired(0.5, Estimate(0.1, 0.1 - 0.196, 0.1 + 0.196))
    assert paired == Change(0.5, 0.1, pytest.approx(0.1))


def history(n, seed, judge_slope, reward_slope=0.01):
    rng = random.Random(seed)
    for update in range(1, n + 1):
        yield (
            update,
            {
                "reward/mean": 0.4 + reward_slope * update + rng.gauss(0, 0.02),
                "judge/clip": 0.3 + judge_slope * update + rng.gauss(0, 0.02),
                "images/diversity": 0.5 + rng.gauss(0, 0.02),
                "loss": rng.gauss(0, 1),
            },
        )


def test_an_alarm_that_hovers_at_its_limit_speaks_once():
    alarms = Alarms(Limits(window=5, diversity_drop=0.3))
    for update in range(1, 60):
        rising = {"reward/mean": 0.1 * update + 0.001 * (update % 2)}
        diversity = 1.0 if update <= 5 else 0.68 if update % 6 < 3 else 0.72  # in and out of the limit
        alarms.add(update, {**rising, "images/diversity": diversity + 0.0001 * (update % 2)})
    assert len(alarms.raised) == 1 and "diversity" in alarms.raised[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_hacked_run_raises_one_alarm_once(seed):
    alarms = Alarms(Limits(window=10))
    new = [alarms.add(*row) for row in history(60, seed, judge_slope=-0.01)]
    assert not any(new[:19])  # two windows are needed
    assert [text for texts in new for text in texts] == alarms.raised
    assert len(alarms.raised) == 1 and "judge clip fell" in alarms.raised[0] and alarms.active == ["judge/clip"]


@pytest.mark.parametrize("seed", range(3))
def test_an_honest_run_and_a_failing_run_raise_none(seed):
    for slopes in ({"judge_slope": 0.01}, {"judge_slope": -0.01, "reward_slope": -0.01}):
        alarms = Alarms(Limits(window=10))
        for row in history(60, seed, **slopes):
            assert alarms.add(*row) == []


def test_a_resumed_history_goes_on_and_memory_is_bounded():
    rows = list(history(80, 5, judge_slope=-0.01))
    straight, before, after = Alarms(), Alarms(), Alarms()
    expected = [straight.add(*row) for row in rows]
    got = [before.add(*row) for row in rows[:27]]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    got += [after.add(*row) for row in rows[27:]]
    assert got == expected and after.state_dict() == straight.state_dict()
    assert all(len(values) <= 10 for part in (straight.first, straight.last) for values in part.values())
    assert "loss" not in straight.first


def test_a_window_of_one_is_refused():
    with pytest.raises(UserError, match="alarms.window is 1"):
        Limits(window=1)


# --- non-finite -------------------------------------------------------------------------------------------------------


def test_finite_numbers_pass():
    require_finite({"loss": 1.0, "grad": torch.zeros(3), "none": torch.empty(0)}, "update 1")


def test_what_is_not_finite_is_named():
    values = {"loss": NAN, "fine": 1.0, "grad": torch.tensor([[0.0, -INF], [NAN, 1.0]]), "scale": torch.tensor(INF)}
    with pytest.raises(GuardStop, match=r"^update 12: loss is nan, grad is -inf \(2 values\), scale is inf; expected"):
        require_finite(values, "update 12")


def test_all_processes_stop_together():
    given = []
    with pytest.raises(GuardStop, match="another process"):
        require_finite({"loss": 1.0}, "update 1", reduce_max=lambda x: given.append(x.item()) or torch.ones(1))
    with pytest.raises(GuardStop, match="loss is nan"):
        require_finite({"loss": NAN}, "update 1", reduce_max=lambda x: given.append(x.item()) or x)
    assert given == [0.0, 1.0]


def test_ten_skips_in_a_row_stop():
    skips = ScaleSkips()
    for skipped in [True] * 9 + [False] + [True] * 9:
        skips.add(skipped)
    resumed = ScaleSkips()
    resumed.load_state_dict(skips.state_dict())
    assert (resumed.in_a_row, resumed.total) == (9, 18)
    with pytest.raises(GuardStop, match="10 optimizer steps in a row"):
        resumed.add(True)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_request_and_handlers_are_restored(number, code, capfd):
    before = {n: signal.getsignal(n) for n in StopSignals.SIGNALS}
    with StopSignals() as stop:
        assert stop.requested is None and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.requested == number and stop.exit_code == code
    assert {n: signal.getsignal(n) for n in StopSignals.SIGNALS} == before
    assert number.name in capfd.readouterr().err


def test_handlers_are_restored_after_an_error_and_left_alone_in_threads():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []
    thread = threading.Thread(
        target=lambda: StopSignals().__enter__() and seen.append(signal.getsignal(signal.SIGTERM))
    )
    thread.start()
    thread.join()
    assert seen == [before]


def test_two_kinds_save_and_the_second_of_one_kind_ends_at_once():
    script = textwrap.dedent("""
        import signal, sys
        from flowrl.guards import StopSignals
        with StopSignals() as stop:
            while True:
                print("ready", stop.requested, flush=True)
                sys.stdin.readline()
                if sys.argv[1] == "polite" and stop.requested:
                    print("saved", flush=True)
                    sys.exit(stop.exit_code)
    """)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}

    def run(kind, *numbers):
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [sys.executable, "-c", script, kind], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env
        ) as p:
            assert p.stdout.readline().startswith("ready None")
            for number in numbers:
                p.send_signal(number)
                p.stderr.readline(), p.stderr.readline()  # handled, or the process has ended
            out, _ = p.communicate("\n", timeout=60)
            return p.returncode, out

    # Ctrl-C, then the launcher's SIGTERM: still saved, with the code of the first
    code, out = run("polite", signal.SIGINT, signal.SIGTERM)
    assert code == 130 and out == "saved\n"
    # a program that never looks is ended by the second
    assert run("deaf", signal.SIGTERM, signal.SIGTERM)[0] == -signal.SIGTERM
