"""Checkpoints under kills, damage, full disks and second writers."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import flowrl.checkpoint as checkpoint
from flowrl.checkpoint import (
    DamagedCheckpoint,
    flatten_state,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    unflatten_state,
    writer_lock,
)
from flowrl.errors import UserError


def content(step):
    """Tensors and state that say which step they belong to, so that a mixture of two saves would show."""
    return {"w": torch.full((3, 5), float(step)), "n": torch.tensor(step)}, {"step": step, "note": "é"}


def save(folder, step, **options):
    return save_checkpoint(folder, step, *content(step), **options)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.name != ".lock")


def check(found, step):
    assert found.step == step and found.state == {"step": step, "note": "é"}
    assert torch.equal(found.tensors["w"], torch.full((3, 5), float(step))) and found.tensors["n"] == step


# --- round trip -----------------------------------------------------------------------------------------------------


def test_round_trip_keeps_every_bit_and_dtype(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "odd name/with é": torch.randn(7).bfloat16(),
        "half": torch.randn(2, 3).half(),
        "double": torch.randn(3, dtype=torch.float64),
        "scalar": torch.tensor(-0.0),
        "special": torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45]),
        "bytes": torch.arange(256).to(torch.uint8),
        "flag": torch.tensor([True, False]),
        "big": torch.tensor([2**62 + 1]),
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(0, 3),
        "view": base[:, 1:3],
        "transposed": base.T,
        "same": base,
        "alias": base,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    state = {"a": [0.1, 1e-320, -0.0, 2**70, None, True, "x"], "nan": float("nan"), "nested": {"k": {}}}
    path = save_checkpoint(tmp_path, 7, tensors, state)
    assert path == tmp_path / "step_000007"
    found = load_latest(tmp_path)
    assert found.tensors.keys() == tensors.keys() and found.path == path
    for name, x in tensors.items():
        y = found.tensors[name]
        assert y.dtype == x.dtype and y.shape == x.shape, name
        assert (
            x.detach().contiguous().numpy(force=True).tobytes() == y.numpy().tobytes()
            if (x.dtype != torch.bfloat16)
            else torch.equal(x, y)
        ), name
    assert repr(found.state) == repr(state)  # repr tells -0.0 from 0.0 and holds NaN


def test_nothing_to_load(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None
    save_checkpoint(tmp_path, 0, {}, {})
    assert load_latest(tmp_path).tensors == {}


def test_the_newest_ones_are_kept_by_number_not_by_name(tmp_path):
    for step in (8, 9, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_1000000", "step_999999"]
    check(load_latest(tmp_path), 1_000_000)
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, 11, keep=0)


def test_going_back_to_an_older_step_leaves_no_later_one_that_would_win(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=3)
    assert names(tmp_path) == ["step_000010", "step_000015"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {"w": torch.zeros(1)}, {"second": True})
    assert names(tmp_path) == ["step_000005"]
    assert load_latest(tmp_path).state == {"second": True}


def test_a_state_that_json_cannot_hold_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, {}, {"x": object()})
    assert names(tmp_path) == []


# --- kills ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the save as a kill would: no handler of the save catches it."""


STEPS_OF_A_SAVE = ("mkdir", "fsync", "replace", "rmtree", "save_file", "open")


def arm(monkeypatch, at):
    """Make the at-th system step of a save the last one; returns the counter. Each dies before it acts."""
    count = [0]

    def wrap(target, name, real):
        def step(*args, **kwargs):
            count[0] += 1
            if count[0] > at:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, step)

    wrap(os, "fsync", os.fsync)
    wrap(os, "replace", os.replace)
    wrap(shutil, "rmtree", shutil.rmtree)
    wrap(Path, "mkdir", Path.mkdir)
    wrap(checkpoint, "save_file", checkpoint.save_file)
    wrap(checkpoint, "_write", checkpoint._write)
    return count


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step, only one kept"])
def test_a_kill_before_any_step_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again):
    step, keep = (10, 1) if again else (20, 1)
    at = 0
    while True:
        folder = tmp_path / str(at)
        save(folder, 10)
        with monkeypatch.context() as patch:
            count = arm(patch, at)
            try:
                save(folder, step, keep=keep)
                finished = True
            except Killed:
                finished = False
        seen = load_latest(folder)  # a reader that does not take the lock
        check(seen, seen.step)
        assert seen.step in (10, step)
        with writer_lock(folder):  # the next run
            assert all("." not in name for name in names(folder))
            check(load_latest(folder), seen.step)
            save(folder, 30, keep=1)
            assert names(folder) == ["step_000030"]
        if finished:
            break
        at += 1
    assert count[0] == at >= 10 and seen.step == step


def test_sigkill_at_random_moments_of_a_saving_loop(tmp_path):
    """Twelve processes save without pause and are killed; after each, the newest checkpoint must be whole.

    The driver imports torch once and forks the victims.
    """
    driver = textwrap.dedent("""
        import os, random, signal, sys, time, warnings
        import torch
        from flowrl.checkpoint import load_latest, save_checkpoint, writer_lock
        torch.set_num_threads(1)
        warnings.simplefilter("error")  # a skipped checkpoint would be a failure
        folder, rng, reached, leftovers = sys.argv[1], random.Random(int(sys.argv[2])), [], 0
        for victim in range(12):
            ready, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                with writer_lock(folder):
                    found = load_latest(folder)
                    step = found.step if found else 0
                    os.write(tell, b"x")
                    while True:
                        step += 1
                        save_checkpoint(folder, step, {"w": torch.full((50_000,), float(step))}, {"step": step}, keep=2)
            os.read(ready, 1)
            time.sleep(rng.uniform(0.005, 0.12))
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            leftovers += any(".tmp-" in n for n in os.listdir(folder))
            found = load_latest(folder)
            if found:
                assert found.state == {"step": found.step} and (found.tensors["w"] == found.step).all(), found
            reached.append(found.step if found else 0)
        assert reached == sorted(reached) and reached[-1] >= 3, reached
        print("kills inside a save:", leftovers, "of 12; reached", reached)
        assert leftovers >= 1  # the kills did hit saves
    """)
    seed = random.randrange(10**6)
    done = subprocess.run(
        [sys.executable, "-c", driver, str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (seed, done.stdout, done.stderr)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "longer"])
def test_damage_is_found_named_and_stepped_over(tmp_path, file, damage):
    save(tmp_path, 10)
    path = save(tmp_path, 20) / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        where = random.randrange(len(data))
        data[where] ^= 1 << random.randrange(8)
        path.write_bytes({"cut": data[:-1], "flip": data, "empty": b"", "longer": path.read_bytes() + b" "}[damage])
    if (file, damage) == ("manifest.json", "longer"):  # a trailing space in JSON is no damage
        check(load_latest(tmp_path), 20)
        return
    with pytest.warns(UserWarning, match=rf"skipping.*step_000020: .*{file}"):
        check(load_latest(tmp_path), 10)
    with pytest.raises(DamagedCheckpoint, match=file):
        load_checkpoint(path.parent)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    original = path.read_bytes()
    meaning = json.loads(original)
    for where in range(len(original)):
        data = bytearray(original)
        data[where] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        try:
            same = json.loads(data) == meaning  # white space only
        except ValueError:
            same = False
        if not same:
            with pytest.raises(DamagedCheckpoint, match="manifest.json"):
                load_checkpoint(path.parent)


def test_nothing_intact_is_an_error_not_a_fresh_start(tmp_path):
    (save(tmp_path, 1) / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match="skipping"),
        pytest.raises(UserError, match="no checkpoint.*intact.*state.json"),
    ):
        load_latest(tmp_path)


def test_a_save_after_stepping_over_damage_replaces_the_damaged_one(tmp_path):
    save(tmp_path, 10)
    (save(tmp_path, 20) / "state.json").write_text("{}")
    save(tmp_path, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(load_latest(tmp_path), 20)


def test_an_unreadable_file_is_stepped_over(tmp_path, monkeypatch):
    save(tmp_path, 10)
    bad = save(tmp_path, 20) / "tensors.safetensors"
    real = checkpoint._sha256

    def sha256(path):
        if path == bad:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "_sha256", sha256)
    with pytest.warns(UserWarning, match="step_000020/tensors.safetensors"):
        check(load_latest(tmp_path), 10)


def test_a_future_format_is_refused_with_advice(tmp_path, monkeypatch):
    save(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        save(tmp_path, 20)
    with pytest.raises(UserError, match=r"format 2; this flowrl reads up to 1; .* install"):
        load_latest(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        load_checkpoint(tmp_path / "step_000099")


def test_another_thread_count_is_told(tmp_path):
    save(tmp_path, 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"saved with {threads} torch threads.*threads: {threads} "):
            load_latest(tmp_path)
    finally:
        torch.set_num_threads(threads)


def test_the_manifest_says_how_it_was_made(tmp_path):
    manifest = json.loads((save(tmp_path, 3) / "manifest.json").read_text())
    assert manifest["version"] == 1 and manifest["step"] == 3 and manifest["threads"] == torch.get_num_threads()
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["files"]["state.json"]["size"] == (tmp_path / "step_000003/state.json").stat().st_size


# --- full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["save_file", "_write", "_sync"])
def test_a_full_disk_keeps_the_old_checkpoint_and_tells_sizes(tmp_path, monkeypatch, call):
    save(tmp_path, 10)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, call, full)
        with pytest.raises(UserError, match=r"step 20 .*No space left.*needs about .* MB; .* MB are free.*--resume"):
            save(tmp_path, 20)
    assert names(tmp_path) == ["step_000010"]
    check(load_latest(tmp_path), 10)
    save(tmp_path, 20)
    check(load_latest(tmp_path), 20)


def test_a_real_limit_on_file_size(tmp_path):
    """The same through the kernel: files of this process may not grow past 64 kB for a moment."""
    save(tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large.*needs about 0.4 MB"):
            save_checkpoint(tmp_path, 20, {"w": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step_000010"]
    check(load_latest(tmp_path), 10)


def test_a_failed_deletion_warns_and_goes_on(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(source, target):
        if "step_000001" in str(source):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="could not delete the old checkpoint .*step_000001"):
        save(tmp_path, 3)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]


# --- one writer -----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    with writer_lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), writer_lock(tmp_path):
            pass
    with writer_lock(tmp_path):
        pass


def test_the_next_run_clears_leftovers_and_nothing_else(tmp_path):
    save(tmp_path, 10)
    for name in ("step_000020.tmp-123", "step_000010.tmp-9", "step_000010.replaced-5", "mine.tmp-1", "step_abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    with writer_lock(tmp_path):
        assert names(tmp_path) == ["mine.tmp-1", "step_000010", "step_abc"]


# --- optimizer state ------------------------------------------------------------------------------------------------


def steps(model, optimizer, scheduler, n, seed):
    for i in range(n):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


def make(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), amsgrad=True)
    else:
        optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}], 1e-3, 0.9)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.93)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_continues_bit_for_bit_from_disk(tmp_path, kind):
    straight = make(kind)
    steps(*straight, 7, seed=100)

    first = make(kind)
    steps(*first, 3, seed=100)
    tensors, skeleton = flatten_state(first[1].state_dict(), "optimizer")
    assert all(name.startswith("optimizer/") for name in tensors)
    weights = {f"model/{k}": v for k, v in first[0].state_dict().items()}
    save_checkpoint(tmp_path, 3, {**weights, **tensors}, {"optimizer": skeleton, "scheduler": first[2].state_dict()})

    second = make(kind)
    found = load_latest(tmp_path)
    second[0].load_state_dict({k[6:]: v for k, v in found.tensors.items() if k.startswith("model/")})
    second[1].load_state_dict(unflatten_state(found.tensors, found.state["optimizer"]))
    second[2].load_state_dict(found.state["scheduler"])
    steps(*second, 4, seed=103)

    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    a, b = (flatten_state(x[1].state_dict()) for x in (straight, second))
    assert a[1] == b[1] and a[0].keys() == b[0].keys()  # hyper-parameters and structure
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_flatten_keeps_types_and_odd_values():
    state = {0: {"step": torch.tensor(3.0)}, "0x": (0.9, [1, None]), "f": [0.1, -0.0, float("inf")], "t": True, "e": {}}
    tensors, skeleton = flatten_state(state, "p")
    assert list(tensors) == ["p/0/step"]
    back = unflatten_state(tensors, json.loads(json.dumps(skeleton)))
    assert repr(back) == repr(state)  # int keys, tuples, -0.0


def test_what_could_only_be_pickled_is_refused():
    with pytest.raises(TypeError, match="opt/a/1 holds a object"):
        flatten_state({"a": [1, object()]}, "opt")
    with pytest.raises(TypeError, match="both called 'p/0'"):
        flatten_state({0: torch.ones(1), "0": torch.zeros(1)}, "p")
