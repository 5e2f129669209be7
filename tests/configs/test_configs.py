"""Every shipped file is valid, and every recipe survives its own resolved form."""

from __future__ import annotations

import pytest
import yaml

from flowrl.config import config_folder, load_config, parse_config, parse_yaml, resolved_yaml, shipped_configs

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
