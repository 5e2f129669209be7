"""What is written about the machine helps to repeat a run and gives nobody away."""

import getpass
import json
import platform
import subprocess

import torch

from flowrl import environment
from reward_models.protocol import RewardSpec


def test_written_and_read_back(tmp_path):
    assert environment.read_environment(tmp_path) == {}
    environment.write_environment(tmp_path, "cpu", 2, [RewardSpec("jpeg", version="3", licence="Apache-2.0")])
    found = environment.read_environment(tmp_path)
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (found["device"], found["processes"], found["torch_threads"]) == ("cpu", 2, torch.get_num_threads())
    assert found["rewards"] == [{"name": "jpeg", "version": "3", "licence": "Apache-2.0"}]


def test_no_names_of_machines_people_or_folders():
    text = json.dumps(environment.environment())
    for secret in (platform.node(), getpass.getuser(), "/home", "/root", "/work"):
        assert not secret or secret not in text


def test_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "flowrl" / "environment.py"))
    (tmp_path / "flowrl").mkdir()
    assert environment.environment()["commit"] is None  # installed, not a checkout

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        run = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    git("init")
    assert environment.environment()["commit"] is None  # nothing committed yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    assert environment.environment()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert environment.environment()["commit"] == git("rev-parse", "HEAD") + "+changes"
