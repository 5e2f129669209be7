"""The model card (README.md) of an export: how it was made, how to use it, what it scores, where it fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from flowrl import environment, summary
from flowrl.report import model_name, number, signed, verdict

# Licences of base models by the start of their hub id.
LICENCES = {
    "tiny-": "apache-2.0",
    "stabilityai/stable-diffusion-3": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
}


def write_card(
    run_folder: str | Path, out: str | Path, *, merged: bool, weights: str = "current", sheet: bool = False
) -> Path:
    """Write `README.md` into `out` from the files of the run; what was not measured is said to be missing."""
    run = Path(run_folder)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    facts_file = run / summary.FILE
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.exists() else {}
    found = environment.read_environment(run)
    base, known = model_name(config["policy"]["path"])
    licence = next((terms for start, terms in LICENCES.items() if base.startswith(start)), None)
    before, after = summary.read_rows(run, "before"), summary.read_rows(run, "after")
    content = {
        "header": _header(base if known else None, licence, merged),
        "base": base,
        "load": base if known else f"PATH/TO/{base}",
        "licence": licence,
        "merged": merged,
        "whole": (Path(out) / "model_index.json").exists(),
        "part": "unet" if (Path(out) / "unet").is_dir() else "transformer",
        "weights": weights,
        "sheet": sheet,
        "config": config,
        "facts": facts,
        "evaluation": facts.get("eval") or {},
        "numbers": _numbers(facts.get("eval") or {}),
        "flat": _flat_tasks(before, after),
        "rewards": found.get("rewards") or [],
        "reward_names": _reward_names(config.get("reward")),
        "commit": found.get("commit"),
    }
    pages = Environment(
        loader=PackageLoader("flowrl"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )  # Markdown, not HTML
    path = Path(out) / "README.md"
    path.write_text(pages.get_template("card.md.j2").render(content), encoding="utf-8")
    return path


def _header(base: str | None, licence: str | None, merged: bool) -> str:
    """The YAML block that model hubs read."""
    header: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "flowrl", *([] if merged else ["lora", "template:sd-lora"])],
    }
    if base and "/" in base:
        header["base_model"] = base
    header["license"] = "apache-2.0" if licence == "apache-2.0" else "other"
    if licence not in (None, "apache-2.0"):
        header["license_name"] = licence
    return yaml.safe_dump(header, sort_keys=False).strip()


def _numbers(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of measured numbers: one per score, held-out judge, and the diversity."""
    stages = {stage: evaluation.get(stage) or {} for stage in ("before", "before_guided", "after", "paired")}
    rows = []
    for held_out in (False, True):
        groups = {stage: values.get("held_out", {}) if held_out else values for stage, values in stages.items()}
        for name in [
            key for key in groups["before"] if isinstance(groups["before"][key], Mapping) and key != "held_out"
        ]:
            row = {stage: _cell(group.get(name)) for stage, group in groups.items()}
            rows.append({"name": name + (" (held-out judge)" if held_out else ""), **row})
    if stages["before"]:
        diversity = {stage: number(values.get("diversity")) for stage, values in stages.items()}
        rows.append({"name": "diversity within a prompt", **diversity})
    return rows


def _cell(entry: Mapping[str, Any] | None) -> str:
    if not entry:
        return "–"
    write = signed if "mean_diff" in entry else number
    low, high = entry["ci95"]
    return f"{write(entry.get('mean_diff', entry.get('mean')))} [{write(low)}, {write(high)}]"


def _flat_tasks(before: list[summary.EvalRow], after: list[summary.EvalRow]) -> list[str]:
    """Tasks without a significant gain in the first score."""
    if not before or not after:
        return []
    score = summary.names(before, "scores")[0]
    flat = []
    for tag in dict.fromkeys(row.get("tag") for row in before):
        if tag:
            gain = summary.paired([r for r in before if r["tag"] == tag], after, "scores", score)
            if verdict(gain) != "better":
                flat.append(tag)
    return flat


def _reward_names(reward: Any) -> list[str]:
    from flowrl.config_checks import reward_names

    return reward_names(reward) or [str(reward)]
