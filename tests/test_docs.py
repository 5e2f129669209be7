"""What the documents say exists: commands and their options, configs and keys, links, names in the code, metrics."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import gaussian_runs
import pytest
import typer

from flowrl import train
from flowrl.cli import app
from flowrl.config import load_config, shipped_config, shipped_configs, valid_names
from flowrl.planning import make_plan
from flowrl.policies.gaussian import GaussianPolicy
from samplers import sd3_sigmas

ROOT = Path(__file__).parent.parent
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SHELL = re.compile(r"```(?:sh|bash)\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
NO_KEYS = {"policy.sigmas", "policy.predict", "policy.decode", "prompts.txt"}  # dotted names of other things
FOREIGN = {"git", "cd", "hf", ".venv/bin/pre-commit"}  # commands that are not ours to check


def commands(path: Path) -> Iterator[list[str]]:
    """The commands of a document's shell blocks as words, without comments and variable assignments."""
    for block in SHELL.findall(path.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"<[^>]*>", "PLACEHOLDER", line)
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words and words[0] not in FOREIGN:
                    yield words


COMMANDS = [(path.name, words) for path in DOCS for words in commands(path)]


def check_flowrl(words: list[str]) -> None:
    """Parse the options, and check the config of verbs that take one."""
    command, name, words = typer.main.get_command(app), "flowrl", list(words)
    while hasattr(command, "commands"):
        if not words:
            return
        name = words.pop(0)
        assert name in command.commands, f"there is no flowrl {name}"
        command = command.commands[name]
    given = command.make_context(name, words).params
    if "config" in given:
        load_config(given["config"], given["overrides"] or [])


def check_module(module: str, words: list[str]) -> None:
    found = importlib.import_module(module)
    if hasattr(found, "app"):
        typer.main.get_command(found.app).make_context(module, words)
        return
    given = found.parser().parse_intermixed_args(words)
    load_config(getattr(given, "config", "quickstart"), given.overrides)


def check_launch(words: list[str]) -> None:
    substituted = words[words.index("--config_file") + 1]
    inner = re.fullmatch(r"\$\((.*)\)", substituted)
    assert inner, f"{substituted} is no path for everyone"
    check_flowrl(shlex.split(inner[1])[1:])
    assert shipped_config(inner[1].split()[-1]).is_file()
    assert words[-4:-2] == ["-m", "flowrl"]
    check_flowrl(words[-2:])


def check_pip(words: list[str]) -> None:
    code = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert re.search(rf'EXTRAS\["{extra}"\]|^    "{extra}":', code, re.MULTILINE), f"there is no extra {extra}"


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name = word.partition("=")[0]
        assert re.search(rf"^{name}( \?=|:)", makefile, re.MULTILINE), f"the Makefile has no {name}"


@pytest.mark.parametrize(("document", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_every_command_exists(document: str, words: list[str]) -> None:
    match words:
        case ["flowrl", *rest]:
            check_flowrl(rest)
        case ["python", "-m", module, *rest]:
            check_module(module, rest)
        case ["accelerate", "launch", *rest]:
            check_launch(rest)
        case ["pip", "install", *rest]:
            check_pip(rest)
        case ["make", *rest]:
            check_make(rest)
        case _:
            pytest.fail(f"{document} uses {words[0]}, which this test does not know")


def test_the_readme_shows_the_two_commands_first() -> None:
    first = next(iter(SHELL.findall((ROOT / "README.md").read_text(encoding="utf-8"))))
    assert "make quickstart" in first and "make test" in first


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for text, target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        where = (path.parent / file).resolve() if file else path
        assert where.exists(), f"{path.name} links to {target}, which is not there"
        assert where.is_relative_to(ROOT)
        if anchor:
            assert anchor in headings(where), f"{target} names no heading of {where.name}"
        if where.suffix == ".py" and re.fullmatch(r"`\w+`", text):
            name = text.strip("`")
            defined = rf"^(def|class) {name}\b|^    def {name}\b|^{name}\b.* = "
            assert re.search(defined, where.read_text(encoding="utf-8"), re.MULTILINE), f"{where.name} has no {name}"


def headings(path: Path) -> set[str]:
    """The anchors that headings get: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_config_keys_exist(path: Path) -> None:
    known = set(valid_names())
    sections = {name.partition(".")[0] for name in known if "." in name}
    for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
        for name in re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w/(])", code):
            if name.partition(".")[0] in sections and name not in NO_KEYS:
                assert name in known, f"{path.name} speaks of {name}, which is no config key"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_python_is_valid_and_its_names_exist(path: Path) -> None:
    for block in PYTHON.findall(path.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("flowrl", "reward_models", "samplers"):
                    assert hasattr(importlib.import_module(node.value.id), node.attr), f"{node.value.id}.{node.attr}"


def test_quoted_messages_are_those_of_the_code() -> None:
    """Messages stand as **`...`** at the beginning of a paragraph, or right after another one."""
    source = "\n".join(
        file.read_text(encoding="utf-8")
        for package in ("flowrl", "samplers", "reward_models")
        for file in sorted((ROOT / package).rglob("*.py"))
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may go over several lines
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\*\*`([^`]+)`\*\*", text, re.MULTILINE)
    assert len(quoted) > 8
    for message in quoted:
        assert message in source, f"no message says {message!r}"


LOGGING = {  # what makes a run log more than the others
    "evaluation": [],
    "history": ["advantage.std=history"],
    "imitation": ["objective.layer_tuning={}"],
    **{name: [f"objective={{name: {name}}}"] for name in ("guard", "dppo", "tmpo")},
    "nft": ["objective={name: nft, kl: {weight: 0.1}}", "rollout.kernel=ode"],
}


@pytest.mark.parametrize("options", LOGGING.values(), ids=LOGGING)
def test_every_logged_number_is_explained(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")
    config = gaussian_runs.config(
        tmp_path, "updates=1", "objective.kl.weight=0.1", gaussian_runs.evaluated(tmp_path), "eval.every=1", *options
    )
    train(config, policy=GaussianPolicy(2))
    table = (ROOT / "docs" / "flow_grpo.md").read_text(encoding="utf-8").partition("## What is logged")[2]
    patterns = [re.sub(r"<\w+>", ".+", name) for name in re.findall(r"`([\w/<>]+)`", table)]
    for file in ("metrics.jsonl", "timings.jsonl"):
        row = json.loads((tmp_path / "run" / file).read_text().splitlines()[0])
        for name in set(row) - {"update", "alarms"}:
            assert any(re.fullmatch(pattern, name) for pattern in patterns), name


METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^Plan of `([\w/]+)`[^\n]*:\n\n```text\n(.*?)\n```", METHODS, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("name", "drawing"), PLANS, ids=[name for name, _ in PLANS])
def test_plans_are_those_of_the_recipes(name: str, drawing: str) -> None:
    config = load_config(name)
    plan = make_plan(config, sd3_sigmas(config.rollout.steps), 0)
    assert plan.describe(plan.roots(config.group_size)) == drawing


def test_every_method_is_in_the_table_and_on_the_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    methods = {name.partition("/")[0] for name in shipped_configs() if "/" in name}
    assert len(methods) >= 15
    for method in methods:
        assert f"configs/{method}/" in readme, f"the README's table has no recipe of {method}"
        drawn = any(name.startswith(f"{method}/") for name, _ in PLANS)
        loss = {"grpo_guard": "guard", "flow_dppo": "dppo"}.get(method)  # these have the plan of Flow-GRPO
        assert drawn or method == "flow_grpo" or (loss and f"`objective.name: {loss}`" in METHODS), method
