"""Reading, overriding and checking configs; every mistake is reported at once with the nearest valid name."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from flowrl import config as cfg
from flowrl.errors import UserError
from flowrl.schema import Config, RolloutConfig

BASE: dict[str, Any] = {
    "output_dir": "runs/x",
    "policy": {"path": "tiny-sd3"},
    "reward": {"shapes": 1.0},
    "prompts": {"source": "shapes:train"},
    "updates": 10,
    "prompts_per_update": 4,
    "group_size": 6,
}


def with_(*overrides: str, processes: int = 1) -> Config:
    data, found = cfg.apply_overrides(BASE, overrides)
    return cfg.parse_config(data, processes=processes, already=found)


def complaint(*overrides: str, processes: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        with_(*overrides, processes=processes)
    return str(caught.value)


def test_a_minimal_config_is_enough_and_frozen() -> None:
    config = cfg.parse_config(copy.deepcopy(BASE))
    assert (config.seed, config.method, config.rollout.kernel, config.ema) == (0, "flow_grpo", "flow", None)
    assert config.objective.clip == (1e-4, 1e-4)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_overrides_are_read_as_yaml() -> None:
    config = with_(
        "seed=7",
        "optimizer.lr=1e-3",
        "optimizer.betas=[0.8, 0.9]",
        "ema.decay=0.5",
        "eval=null",
        "rollout.window={size: 2, high: 4}",
        "rollout.shared_noise=true",
        "reward={jpeg: 2, shapes: {weight: -0.5}}",
        "policy.lora.from=some/folder",
        "objective.clip_range_high=2.5e-4",
    )
    assert config.seed == 7 and config.optimizer.lr == 0.001 and config.optimizer.betas == (0.8, 0.9)
    assert config.ema is not None and config.ema.decay == 0.5 and config.ema.every == 1
    assert config.eval is None and config.rollout.window_range == (0, 4) and config.rollout.shared_noise
    assert config.reward == {"jpeg": 2, "shapes": {"weight": -0.5}}
    assert config.policy.lora.start_from == "some/folder"
    assert config.objective.clip == (1e-4, 2.5e-4)
    assert BASE["policy"] == {"path": "tiny-sd3"}  # the caller's data is left alone


def test_all_mistakes_are_reported_together() -> None:
    data = copy.deepcopy(BASE)
    del data["updates"]
    data |= {
        "polcy": {"path": "x"},
        "lr": 1e-4,
        "group_size": "many",
        "optimizer": {"lrate": 1e-4, "betas": [0.9], "inner_updates": 3},
        "rollout": {"kernel": "cps", "level": 1.5, "window": {"size": 5, "hgih": 4}},
        "eval": {"tasks": [1]},
    }
    with pytest.raises(UserError) as caught:
        cfg.parse_config(data, already=["override 'x': expected key=value"])
    lines = str(caught.value).splitlines()
    wanted = [
        "override 'x'",
        "unknown key polcy; did you mean policy?",
        "unknown key lr; did you mean optimizer.lr?",
        "unknown key optimizer.lrate; did you mean optimizer.lr?",
        "unknown key rollout.window.hgih; did you mean rollout.window.high?",
        "updates is missing",
        "group_size is 'many'; expected a valid integer",
        "optimizer.betas",
        "eval.tasks.0 is 1; expected a valid string",
        "optimizer.inner_updates 3",  # and rules that join values, about the parts that are whole
        "rollout.level is 1.5; expected a level in [0, 1] for kernel cps",
        "rollout.window of 5 steps does not fit",
        "chosen for (kernel, reduction, density) = (flow, mean, gaussian)",
    ]
    assert all(any(w in line for line in lines) for w in wanted), str(caught.value)
    assert len(lines) == 1 + len(wanted)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("promts_per_update", "prompts_per_update"),
        ("rollout.guidence", "rollout.guidance"),
        ("guidance_scale", "rollout.guidance"),
        ("learning_rate", None),
        ("policy.lora.form", "policy.lora.from"),
        ("policy.lora.start_from", "policy.lora.from"),
        ("clip_range", "objective.clip_range"),
    ],
)
def test_the_nearest_key_is_named(wrong: str, right: str | None) -> None:
    text = complaint(f"{wrong}=1")
    assert f"unknown key {wrong}" in text
    assert right is None or right in text


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["prompts_per_update=7", "optimizer.inner_updates=2"], ["prompts_per_update 7", "for example 8"]),
        (["group_size=1"], ["group_size"]),
        (["optimizer.warmup=10"], ["optimizer.warmup 10"]),
        (["rollout.steps=4", "rollout.train_fraction=0.2"], ["rollout.train_fraction"]),
        (["rollout.window.size=9", "rollout.window.high=7"], ["rollout.window of 9 steps"]),
        (["rollout.window={size: 2, high: 8}"], ["only the first 7 of 8", "high at most 7"]),
        (["rollout.height=64"], ["both or neither"]),
        (["rollout.height=65", "rollout.width=64"], ["multiple of 8"]),
        (["rollout.kernel=ode", "objective.measured_with.kernel=ode"], ["rollout.kernel=flow"]),
        (["rollout.level=0"], ["nothing to train"]),
        (["rollout.kernel=cps", "rollout.level=1.01", "objective.measured_with.kernel=cps"], ["[0, 1]"]),
        (["rollout.kernel=cps"], ["measured_with", "cps, mean, gaussian"]),
        (["rollout.reduction=sum"], ["flow, sum, gaussian"]),
        (["objective.guidance=4.5"], ["objective.guidance is 4.5", "rollout.guidance is 1"]),
        (["objective.kl.weight=0.1", "policy.train=full", "policy.reference=false"], ["policy.reference=true"]),
        (["policy.train=full", "policy.quantize=nf4"], ["policy.quantize=null"]),
        (["policy.train=full", "policy.lora.from=x"], ["policy.train=lora"]),
        (["policy.attention=flash"], ["policy.dtype=bfloat16"]),
        (["policy.attention=xformers", "policy.device=cpu"], ["policy.attention=native"]),
        (["policy.device=tpu"], ["policy.device", "auto, cpu, cuda"]),
        (["eval.judge=shapes"], ["eval.judge", "held out"]),
        (["eval.height=64"], ["eval.height is 64"]),
        (["reward={}"], ["reward is empty"]),
        (["reward={shape: 1}"], ["did you mean shapes?"]),
        (["reward=shapes-sotf"], ["did you mean shapes-soft?"]),
        (["reward={shapes: heavy}"], ["finite weight"]),
        (["reward={shapes: {wieght: 1}}"], ["finite weight"]),
        (["reward={shapes: 0}"], ["only zero weights"]),
        (["reward=3"], ["reward is 3", "module:attribute"]),
        (["optimizer.lr=.inf"], ["optimizer.lr is inf", "finite"]),
        (["optimizer.lr=fast"], ["optimizer.lr is 'fast'", "a valid number"]),
        (["optimizer.lr=-1"], ["optimizer.lr is -1", "greater than 0"]),
        (["seed=1.5"], ["seed is 1.5", "a valid integer"]),
        (["updates=true"], ["updates is True"]),
        (["policy=tiny-sd3"], ["policy is 'tiny-sd3'"]),
        (["rollout.kernel=sde"], ["rollout.kernel is 'sde'", "'flow'"]),
        (["lonely"], ["expected key=value"]),
        (["seed.deep=1", "seed=[1"], ["override 'seed=[1'"]),
        (["optimizer.lr={a: 1, a: 2}"], ["duplicate key 'a'"]),
        (["seed=3", "seed.x=3"], ["seed is a single value"]),
    ],
)
def test_impossible_values_and_combinations(overrides: list[str], names: list[str]) -> None:
    text = complaint(*overrides)
    assert all(name in text for name in names), text


def test_a_broken_value_does_not_hide_or_cause_other_problems() -> None:
    text = complaint("optimizer.inner_updates=x", "prompts_per_update=7", "rollout.level=0")
    assert "2 problems" in text and "whole groups" not in text and "nothing to train" in text


def test_groups_must_suffice_for_the_processes() -> None:
    assert with_("prompts_per_update=5", processes=5).prompts_per_update == 5  # one group each
    assert with_("prompts_per_update=5", processes=2).prompts_per_update == 5  # 3 and 2
    assert "prompts_per_update=6" in complaint("prompts_per_update=5", processes=6)
    assert "prompts_per_update=8" in complaint("optimizer.inner_updates=2", processes=4)


@pytest.mark.parametrize(
    ("steps", "fraction", "trained"), [(10, 0.99, 9), (8, 0.99, 7), (8, 0.5, 4), (6, 0.6, 3), (10, 1.0, 9), (2, 0.5, 1)]
)
def test_the_trained_steps_are_int_of_steps_times_fraction_without_the_last(
    steps: int, fraction: float, trained: int
) -> None:
    assert RolloutConfig(steps=steps, train_fraction=fraction).trained_steps == trained


@pytest.mark.parametrize(
    ("kernel", "level"),
    [
        ("flow", 0.7),  # Flow-GRPO, SD3
        ("dance", 0.3),  # DanceGRPO, images
        ("cps", 0.8),  # flow_grpo's recipe without guidance
        ("precise", 1.5),  # its own paper
        ("dance_precise", 0.3),  # the noise of dance, integrated
        ("ddim", 1.0),  # eta of DanceGRPO on SD 1.4
        ("consistency", 1.0),  # full re-noising, as LCM
    ],
)
def test_the_level_is_by_default_the_published_one_of_the_kernel(kernel: str, level: float) -> None:
    chosen = [f"rollout.kernel={kernel}", f"objective.measured_with.kernel={kernel}"]
    config = with_(*chosen)
    assert config.rollout.level == level
    assert yaml.safe_load(cfg.resolved_yaml(config))["rollout"]["level"] == level  # a run folder shows the number
    assert with_(*chosen, "rollout.level=0.5").rollout.level == 0.5
    described = re.split("[,(:)]", cfg.descriptions()["rollout.level"])  # "dance and dance_precise 0.3", ...
    assert [part.split()[-1] for part in described if kernel in part.split()] == [f"{level:g}"]


def test_the_window_ends_by_default_at_half_of_the_steps() -> None:
    assert with_("rollout.steps=10", "rollout.window={size: 3}").rollout.window_range == (0, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 2, column 1: duplicate key 'seed'"),
        ("policy: {path: x, path: y}\n", "duplicate key 'path'"),
        ("a: [1\n", "expected"),
        ("1: 2\n", "key 1 is not a text"),
        ("- a\n", "holds a list"),
        ("", "an empty file"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_strict_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        cfg.read_yaml(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("-2E5", -2e5), ("1.5e3", 1500.0), ("1e", "1e"), ("e5", "e5"), ("1.0", 1.0)]
)
def test_numbers_in_scientific_notation_are_numbers(text: str, value: object) -> None:
    assert cfg.parse_yaml(text, "test") == value


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x81")
    with pytest.raises(UserError, match="not UTF-8"):
        cfg.load_config(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match="No such file"):
        cfg.load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        cfg.load_config("quickstrat")


def test_shipped_configs_are_found() -> None:
    assert {"quickstart", "flow_grpo/tiny_sd3", "flow_grpo/flux_dev"} <= set(cfg.shipped_configs())
    assert not any("accelerate" in name for name in cfg.shipped_configs())
    assert cfg.shipped_config("flow_grpo/tiny_sd3.yaml").is_file()


def test_every_field_is_described() -> None:
    undescribed = [name for name, text in cfg.descriptions().items() if not text]
    assert undescribed == []


def test_valid_names_are_those_of_the_written_file() -> None:
    def dotted(data: dict[str, Any], prefix: str = "") -> set[str]:
        names = set()
        for key, value in data.items():
            names |= {prefix + key} | (dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else set())
        return names

    windowed = ["rollout.window={size: 2}", "rollout.tree={branch: 2}", "rollout.levels.reward_driven={}"]
    clipped = ["objective.adaptive_clip={max: 0.1}", "objective.layer_tuning={}", "rollout.tail={}"]
    sections = [  # which exclude each other
        ["ema={}", "adversary={references: folder}", *windowed, *clipped, "group_size=8"],
        ["rollout.trunk={at: [1]}", "group_size=12", "objective.name=guard", "objective.guard={}"],
        ["rollout.fork={first: 2, last: 3}", "group_size=10", "objective.name=dppo", "objective.dppo={}"],
        ["objective.name=tmpo", "objective.tmpo={}", "rollout.tree={at: [1], draw: {}}", "group_size=8"],
        ["objective.name=nft", "objective.nft={}"],
    ]
    specs = ["reward=shapes", "eval.rewards=shapes"]  # a mapping's keys would be names of rewards
    names = [dotted(yaml.safe_load(cfg.resolved_yaml(with_(*overrides, *specs)))) for overrides in sections]
    assert set().union(*names) == set(cfg.valid_names())


_OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "optimizer.lr": st.floats(1e-12, 1e3),
        "optimizer.eps": st.floats(1e-30, 1.0),
        "optimizer.betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
        "rollout.level": st.floats(1e-3, 0.99),
        "method": st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
        "prompts.tasks": st.none()
        | st.lists(st.sampled_from(["no", "1e3", "null", "on", "12:30", "colors"]), min_size=1),
        "ema": st.none() | st.fixed_dictionaries({"decay": st.floats(0, 0.9999)}),
        "policy.lora.from": st.none() | st.sampled_from(["~", "0x10", "a b", "#", "x: y"]),
    },
)


@given(_OVERRIDES)
def test_the_resolved_file_gives_the_same_config(values: dict[str, Any]) -> None:
    data = copy.deepcopy(BASE)
    for name, value in values.items():
        *parents, leaf = name.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    config = cfg.parse_config(data)
    again = cfg.parse_config(cfg.parse_yaml(cfg.resolved_yaml(config), "resolved"))
    assert again == config
    assert cfg.resolved_yaml(again) == cfg.resolved_yaml(config)


def test_no_section_accepts_unknown_keys() -> None:
    def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
        inner = (cfg._section(field.annotation) for field in model.model_fields.values())
        return {model}.union(*(sections(section) for section in inner if section))

    assert len(sections(Config)) > 10
    assert all(s.model_config["extra"] == "forbid" and s.model_config["strict"] for s in sections(Config))
