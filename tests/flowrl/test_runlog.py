"""Logs survive kills and resumes; screens and trackers never stop a run."""

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.errors import UserError
from flowrl.runlog import RunLog, duration, read_jsonl
from flowrl.trackers import Tracker, flatten, open_trackers


def metrics(update):
    return {"reward/mean": torch.tensor(math.sin(update)), "kl": update * 0.1, "groups": update}


def write(log, first, last):
    for update in range(first, last + 1):
        log.write(update, metrics(update), {"images_per_s": 10.0 * update})


def quiet(folder, **options):
    return RunLog(folder, console=False, **options)


def test_lines_are_strict_json_with_exact_values(tmp_path):
    with quiet(tmp_path) as log:
        value = torch.tensor(0.1)  # float32: its double is 0.10000000149011612
        numbers = {"a": value, "b": math.nan, "c": -math.inf, "d": 3, "e": True}
        log.write(1, numbers, {"rollout_s": 0.5}, alarms=["<look>"])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"update": 1, "a": 0.10000000149011612, "b": null, "c": null, "d": 3, "e": true, "alarms": ["<look>"]}\n'
    )
    (timing,) = read_jsonl(tmp_path / "timings.jsonl")
    assert timing["update"] == 1 and timing["session"] == 1 and timing["rollout_s"] == 0.5 and timing["wall_s"] >= 0


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 40))
def test_interrupted_equals_uninterrupted_byte_for_byte(tmp_path_factory, resumed, beyond, torn):
    folder = tmp_path_factory.mktemp("log")
    with quiet(folder / "straight") as log:
        write(log, 0, 12)
    with quiet(folder / "torn") as log:
        write(log, 0, min(12, resumed + beyond))
    with (folder / "torn" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"update": 99, "reward/mean": 0.123456789, "x'[:torn])  # killed in the middle of a write
    with quiet(folder / "torn", resumed=resumed) as log:
        write(log, resumed + 1, 12)
    assert (folder / "torn" / "metrics.jsonl").read_bytes() == (folder / "straight" / "metrics.jsonl").read_bytes()


def test_timings_keep_the_work_done_twice(tmp_path):
    with quiet(tmp_path) as log:
        write(log, 1, 3)
    with quiet(tmp_path, resumed=2) as log:
        write(log, 3, 4)
    rows = read_jsonl(tmp_path / "timings.jsonl")
    assert [(row["update"], row["session"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)]


def test_resuming_before_the_first_checkpoint_starts_the_log_anew(tmp_path):
    with quiet(tmp_path) as log:
        write(log, 0, 3)
    with quiet(tmp_path, resumed=-1) as log:
        write(log, 0, 1)
    assert [row["update"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_sigkill_loses_no_line_that_was_written(tmp_path):
    script = f"""
        from flowrl.runlog import RunLog
        log = RunLog({str(tmp_path)!r}, console=False)
        for update in range(1, 100000):
            log.write(update, {{"kl": update / 7}})
            print(update, flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 200:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(rows) >= 200
    assert [row["update"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[199]["kl"] == 200 / 7


def test_a_full_disk_is_explained_and_costs_one_update(tmp_path):
    """Through the kernel: files of this process may not grow for a moment."""
    with quiet(tmp_path) as log:
        write(log, 0, 2)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        try:
            with pytest.raises(UserError, match="could not write .*metrics.jsonl: .*continue with --resume"):
                write(log, 3, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with quiet(tmp_path, resumed=2) as log:
        write(log, 3, 4)
    assert [row["update"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_new_run_does_not_write_over_an_old_log(tmp_path):
    with quiet(tmp_path) as log:
        write(log, 0, 1)
    with pytest.raises(UserError, match="--resume"):
        quiet(tmp_path)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2


def test_damage_in_the_middle_is_named_and_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 0}\n{"upd\n{"update": 2}\n')
    with pytest.raises(UserError, match="line 2 of .*metrics.jsonl is damaged"):
        quiet(tmp_path, resumed=2)
    assert path.read_bytes().count(b"\n") == 3
    path.write_bytes(b"[1]\n")
    with pytest.raises(UserError, match="expected a JSON object"):
        read_jsonl(path)


def test_wrong_use_is_an_error(tmp_path):
    with quiet(tmp_path) as log:
        log.write(3, {})
        with pytest.raises(ValueError, match="update 3 after update 3"):
            log.write(3, {})
        with pytest.raises(ValueError, match="'parts' is \\[1, 2\\]"):
            log.write(4, {"parts": [1, 2]})


def test_inactive_processes_write_nothing(tmp_path):
    with RunLog(tmp_path / "x", trackers=["wandb"], active=False) as log:
        write(log, 0, 2)
        log.note("hello")
        log.stage("evaluating", 1, 2)
        log.sync()
    assert not (tmp_path / "x").exists()


# ---- the screen ------------------------------------------------------------------------------------------------------


def test_plain_lines_are_one_per_update_and_grepable(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, total=3, stream=stream, plain_every_s=0) as log:
        log.note("loading [bold]tiny-sd3[/bold]")
        log.stage("evaluating", 1, 2)
        for update in range(1, 4):
            log.write(update, {"reward/mean": 0.25 * update, "judge/tiny-clip": 0.5}, {"images_per_s": 12.34})
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["loading [bold]tiny-sd3[/bold]", "evaluating 1/2"]
    assert lines[2].startswith("update 1/3  reward 0.25  tiny-clip 0.5  images/s 12.3  left ")
    assert lines[4] == "update 3/3  reward 0.75  tiny-clip 0.5  images/s 12.3"
    assert "\x1b" not in stream.getvalue()
    assert (tmp_path / "run.log").read_text().splitlines() == [line for line in lines if "evaluating" not in line]


def test_plain_lines_are_thinned_but_first_last_and_alarms_stay(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, total=50, stream=stream, plain_every_s=3600) as log:
        for update in range(1, 51):
            log.write(update, {}, alarms=["update 20: saturation rises"] if update == 20 else [])
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "update 1/50",
        "ALARM: update 20: saturation rises",
        "update 50/50",
    ]
    assert (tmp_path / "run.log").read_text().count("update ") == 51


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with RunLog(tmp_path, total=2, stream=stream) as log:
        log.stage("evaluating", 1, 2)
        log.note("a prompt with [markup] :smile:")
        log.write(1, {"reward/mean": 0.5})
        log.write(2, {"reward/mean": 0.75})
    assert "update 2/2  reward 0.75" in stream.getvalue()
    assert "[markup] :smile:" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (7625, "2h07m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# ---- trackers --------------------------------------------------------------------------------------------------------


class Recorder:
    """Has the methods of an accelerate tracker; `fail` is raised by every call whose number is in `when`."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, fail=None, when=()):
        self.fail, self.when, self.calls = fail, when, []

    def _call(self, *what):
        self.calls.append(what)
        if len(self.calls) - 1 in self.when:
            raise self.fail

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("config", values)

    def log(self, values, step=None):
        self._call("log", values, step)

    def finish(self):
        self._call("finish")


def test_trackers_get_config_numbers_and_the_end(tmp_path):
    tracker = Recorder()
    with quiet(tmp_path, trackers=[tracker], config={"seed": 0, "policy": {"path": "tiny", "lora": None}}) as log:
        log.write(1, {"kl": 0.5, "gone": math.nan}, {"images_per_s": 2.0})
    assert tracker.calls == [
        ("start",),
        ("config", {"seed": 0, "policy.path": "tiny", "policy.lora": "None"}),
        ("log", {"kl": 0.5, "images_per_s": 2.0}, 1),
        ("finish",),
    ]


def test_an_outage_is_counted_told_once_and_survived(tmp_path):
    stream = io.StringIO()
    tracker = Recorder(ConnectionError("no route"), when={2, 3, 5})  # two of three logs, and the end
    with RunLog(tmp_path, [tracker], stream=stream, plain_every_s=3600) as log:
        write(log, 1, 3)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3
    said = [line for line in stream.getvalue().splitlines() if "tracker" in line]
    assert said == [
        "tracker recorder failed (ConnectionError: no route); training goes on without it",
        "tracker recorder: 3 of 6 calls failed; metrics.jsonl has it all",
    ]


def test_a_tracker_that_cannot_start_is_left_alone():
    def refuse():
        raise TimeoutError("login")

    said = []
    tracker = Tracker("far", refuse, said.append)
    tracker.log({"a": 1.0}, 1)
    tracker.close()
    assert tracker.failures == 1 and len(said) == 2


def test_a_bug_in_a_tracker_is_not_hidden(tmp_path):
    with (
        quiet(tmp_path, trackers=[Recorder(ZeroDivisionError("bug"), when={2})]) as log,
        pytest.raises(ZeroDivisionError),
    ):
        log.write(1, {})


def test_a_client_library_error_counts_as_outage_once_it_is_imported(monkeypatch):
    class Error(Exception):
        pass

    import types

    monkeypatch.setitem(sys.modules, "wandb.errors", types.SimpleNamespace(Error=Error))
    tracker = Tracker("wandb", lambda: Recorder(Error("quota"), when={1}), lambda text: None)
    tracker.log({}, 1)
    assert tracker.failures == 1


def test_accelerate_names_are_opened_or_refused(tmp_path, monkeypatch):
    import accelerate.tracking

    class Local(Recorder):
        name = "local"
        requires_logging_directory = True
        where = None

        def __init__(self, project, folder):
            super().__init__()
            Local.where = (project, folder)

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "local", Local)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["local"])
    (tracker,) = open_trackers(["local"], tmp_path, "mine", print)
    assert Local.where == ("mine", str(tmp_path)) and tracker.failures == 0
    with pytest.raises(UserError, match="'aim' cannot be used here; usable: local"):
        open_trackers(["aim"], tmp_path, "mine", print)


def test_accelerate_still_has_the_names_used():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    assert {"tensorboard", "wandb", "mlflow"} <= {str(name) for name in LOGGER_TYPE_TO_CLASS}
    assert isinstance(get_available_trackers(), list)
    for method in ("start", "store_init_configuration", "log", "finish"):
        assert callable(getattr(GeneralTracker, method))
    assert all(hasattr(kind, "requires_logging_directory") for kind in LOGGER_TYPE_TO_CLASS.values())


def test_flatten():
    assert flatten({"a": 1, "b": {"c": [1, 2], "d": {"e": True}}}) == {"a": 1, "b.c": "[1, 2]", "b.d.e": True}


def test_rows_are_readable_by_anyone(tmp_path):
    with quiet(tmp_path) as log:
        write(log, 0, 2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["groups"] for row in rows] == [0, 1, 2]


def test_time_left_by_updates_or_by_seconds_of_training(tmp_path):
    """After 4 of 100 updates in 8 s of training a budget of 20 s has 6 updates left; a budget of 2000 s has 96."""
    for budget, expected in ((20.0, 6), (2000.0, 96), (None, 96)):
        with RunLog(tmp_path / str(budget), total=100, budget_s=budget, console=False) as log:
            assert log._to_come(4, {"train_s": 8.0}) == expected
            assert log._to_come(100, {"train_s": 8.0}) == 0
