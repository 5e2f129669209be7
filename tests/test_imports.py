"""Imports go one way, and `import flowrl` costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "samplers": set(),
    "reward_models": set(),
    "flowrl": {"samplers", "reward_models"},
    "benchmarks": {"samplers", "reward_models", "flowrl"},
}
THIRD_PARTY_OF_SAMPLERS = {"torch"}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of everything a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        allowed = MAY_IMPORT[package] | {package}
        if path == ROOT / "flowrl" / "cli.py":
            allowed = allowed | {"benchmarks"}
        wrong = set(imports(path)) & set(MAY_IMPORT) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_samplers_need_torch_only() -> None:
    for path in (ROOT / "samplers").rglob("*.py"):
        foreign = set(imports(path)) - set(sys.stdlib_module_names) - {"samplers"} - THIRD_PARTY_OF_SAMPLERS
        assert not foreign, f"{path.name} imports {foreign}"


def test_every_folder_of_code_is_a_package() -> None:
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py, so wheels leave it out"


def test_no_file_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
        if (lines := path.read_text(encoding="utf-8").count("\n")) > 600
    }
    assert not long


def brought(code: str, *heavy: str) -> list[str]:
    """Which of these libraries a fresh process has imported after some code."""
    code += f"; import sys; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_flowrl_brings_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "diffusers", "transformers", "pydantic", "reward_models", "benchmarks")
    assert not brought("import flowrl; flowrl.UserError; from flowrl import cli", *heavy)


def test_rewards_bring_their_libraries_when_they_are_loaded() -> None:
    heavy = ("torchvision", "transformers", "timm", "open_clip", "diffusers", "rapidocr", "onnxruntime")
    service = ("fastapi", "uvicorn", "httpx", "tenacity")
    code = (
        "import reward_models; reward_models.load('shapes'); reward_models.load({'jpeg': 1.0}); reward_models.names()"
    )
    assert not brought(code, *heavy, *service)


def test_every_public_name_exists() -> None:
    import flowrl

    for name in flowrl.__all__:
        assert getattr(flowrl, name) is not None
    assert set(flowrl.__all__) <= set(dir(flowrl))
    with pytest.raises(AttributeError, match="nonsense"):
        flowrl.nonsense  # noqa: B018
