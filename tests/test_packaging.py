"""The wheel holds what it must, and what it holds works from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = ("test", "dev", "tracking", "hub", "quant", "ocr", "clip", "serve", "hpsv2", "notebook", "all")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked and new files, so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(out.glob("flowrl-*.whl"))


def test_the_wheel_holds_code_configs_and_models_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {"flowrl", "samplers", "reward_models", "benchmarks"}

    def expected(folder: str, pattern: str, inside: str = "") -> set[str]:
        files = (path for path in (ROOT / folder).rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
        return {f"{inside or folder}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}

    for package in ("flowrl", "samplers", "reward_models", "benchmarks"):
        assert expected(package, "*.py") | {f"{package}/py.typed"} <= set(names)
    assert expected("configs", "*.yaml", "flowrl/configs") <= set(names)
    assert expected("configs/servers", "*.txt", "flowrl/configs/servers") <= set(names)
    for templates in ("flowrl/templates", "reward_models/judges/templates"):
        assert expected(templates, "*") and expected(templates, "*") <= set(names)
    if (ROOT / "flowrl" / "models").is_dir():
        assert expected("flowrl/models", "*") <= set(names)


def test_the_wheel_names_its_command_licence_and_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "flowrl = flowrl.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata
    assert all(f"Provides-Extra: {name}" in metadata for name in EXTRAS)
    assert any(name.endswith("LICENSE") for name in archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def flowrl(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed package, with the checkout out of sight."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "flowrl", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_configs_are_found_where_the_wheel_is_installed(installed: Path, tmp_path: Path) -> None:
    done = flowrl(installed, tmp_path, "list", "--path", "quickstart")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / "flowrl" / "configs" / "quickstart.yaml"


def test_the_quickstart_runs_from_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    if not all((installed / "flowrl" / "models" / name).is_dir() for name in ("tiny-sd3", "tiny-clip")):
        pytest.skip("the models in the box are not built yet")
    done = flowrl(
        installed, tmp_path, "train", "quickstart", "updates=2", "prompts_per_update=2", "group_size=4", "eval.limit=4",
        "eval.images_per_prompt=2", "eval.steps=4", "eval.baseline_guidance=null", "logging.samples_every=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "quickstart"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "adapter/pytorch_lora_weights.safetensors",
    ):
        assert (run / name).is_file(), name
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert "report" in done.stdout
