"""Every shipped file is valid, and every recipe survives its own resolved form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from judge_server import serve
from PIL import Image
from tiny_pipelines import tiny_flux, tiny_sd3

from flowrl.config import config_folder, load_config, parse_config, parse_yaml, resolved_yaml, shipped_configs
from flowrl.planning import make_plan
from flowrl.policies import load_policy
from flowrl.trainer import train

RECIPES = shipped_configs()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_on_one_and_on_several_processes(name: str) -> None:
    config = load_config(name)
    assert parse_config(parse_yaml(resolved_yaml(config), name)) == config
    for processes in (2, 4):
        assert load_config(name, processes=processes) == config


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_the_keys_that_every_recipe_has(name: str) -> None:
    written = yaml.safe_load((config_folder() / f"{name}.yaml").read_text())
    wanted = {"output_dir", "seed", "policy", "reward", "updates", "prompts_per_update", "group_size", "eval"}
    assert wanted <= set(written)


def test_output_folders_differ() -> None:
    folders = [load_config(name).output_dir for name in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", sorted((config_folder() / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_read_by_accelerate(path: object) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.mixed_precision == "no" and loaded.num_processes >= 2


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipeline class -> folder of a tiny one with random weights."""
    root = tmp_path_factory.mktemp("models")
    tiny_sd3(root / "tokenizer_a").save_pretrained(root / "sd3")
    tiny_flux(root / "tokenizer_b").save_pretrained(root / "flux")
    return {"sd3": root / "sd3", "flux": root / "flux"}


SMALL = {"clip-score": "tiny-clip", "dino": "tiny-clip"}  # scorers and backbones that need weights


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a recipe expects its user to have: the endpoint of a judge, and reference images."""
    pictures = tmp_path_factory.mktemp("references")
    for level in (0, 128, 255):
        Image.new("RGB", (16, 16), (level, 64, 255 - level)).save(pictures / f"{level}.png")

    def brighter(text: str, images: list[np.ndarray], body: dict[str, Any]) -> str:
        return f"<answer>Image {1 + int(images[1].mean() > images[0].mean())} is better</answer>"

    with serve(brighter, model="UnifiedReward") as judge:
        yield {"endpoint": judge.url, "references": str(pictures)}


def replaced(reward: Any, stand_ins: dict[str, str]) -> Any:
    """A reward that can be had here, with the same weights and options."""
    if isinstance(reward, dict):
        return {SMALL.get(k, k): stand_ins.get(k) or replaced(v, stand_ins) for k, v in reward.items()}
    return SMALL.get(reward, reward) if isinstance(reward, str) else reward


def shrunk(name: str, models: dict[str, Path], stand_ins: dict[str, str], out: Path) -> list[str]:
    """Overrides that keep the recipe's method and plan and replace what needs a large model, a GPU or time."""
    config = load_config(name)
    adversary = config.adversary
    drawn = adversary is not None and adversary.references == "shapes:draw"
    side = 64 if "shapes" in str(config.reward) or drawn else 16  # the Shapes world has images of 64x64 pixels
    learning = ["adversary.per_prompt=2"] if adversary else []
    learning += [f"adversary.references={stand_ins['references']}"] if adversary and not drawn else []
    steps = config.rollout.steps
    leaves = len(make_plan(config, [1 - i / steps for i in range(steps + 1)], 0).leaves)
    if config.rollout.tree is not None and config.rollout.tree.draw is not None:
        leaves = config.group_size  # a tree of one update may have fewer leaves than that of another
    size = [f"height={side}", f"width={side}"]
    evaluation = ["limit=2", "images_per_prompt=1", "steps=2", "every=0", "judge=null", *size]
    return [
        f"output_dir={out}",
        f"policy.path={models['flux' if 'flux' in name else 'sd3']}",
        "policy.device=cpu",
        "policy.dtype=float32",
        "policy.quantize=null",
        "policy.attention=native",
        "policy.lora.rank=2",
        "prompts.limit=4",
        "optimizer.name=adamw",
        "updates=2",
        f"prompts_per_update={config.optimizer.inner_updates}",
        f"group_size={max(2, leaves)}",
        "rollout.chunk=64",
        "optimizer.micro_batch=64",
        *(f"rollout.{setting}" for setting in size),
        *(f"eval.{setting}" for setting in evaluation),
        "logging.samples_every=0",
        "logging.sample_prompts=1",
        f"reward={json.dumps(replaced(config.reward, stand_ins))}",
        f"eval.rewards={json.dumps(replaced(config.eval.rewards, stand_ins))}",
        *learning,
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_two_updates_on_a_random_model(
    name: str,
    random_models: dict[str, Path],
    stand_ins: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the report is tested elsewhere; FLUX's 512 text tokens would cost more than all the rest
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")
    tokens = 8 if "flux" in name else None
    monkeypatch.setattr("flowrl.trainer.load_policy", partial(load_policy, max_sequence_length=tokens))
    out = tmp_path / "run"
    config = load_config(name, shrunk(name, random_models, stand_ins, out))
    summary = train(config)
    assert summary["updates"] == 2 and summary["method"] == config.method
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert load_config(out / "config.yaml") == config
