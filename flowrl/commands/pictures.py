"""`flowrl sample` draws images into a folder.

Such a folder holds PNG files and `samples.jsonl`, one line per image: its file name under "image", its prompt, and what
else came with the prompt (which rewards may need). `flowrl.commands.scoring` scores it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.config import read_yaml
from flowrl.errors import UserError
from flowrl.images import LISTING
from flowrl.prompts import Prompt, load_prompts

if TYPE_CHECKING:
    from flowrl.policies import Policy
    from flowrl.sampling import SampleSettings


def open_policy(path: str, *, lora: str | None = None, device: str = "auto", dtype: str = "float32") -> Policy:
    """A policy to draw from: a pipeline (bundled name, folder, hub id) or the folder of a run, with what it trained."""
    from flowrl.policies import LoraSettings, load_policy

    run, revision, whole = Path(path), None, None
    if lora is None and (run / "config.yaml").is_file() and not (run / "model_index.json").exists():  # a merged export
        adapter = run / "adapter"
        if not adapter.is_dir():
            raise UserError(
                f"{path} is a run without a finished adapter/; expected one that `flowrl train` has ended; "
                f"finish it with --resume, or export it with `flowrl export {path}`"
            )
        chosen = read_yaml(run / "config.yaml")["policy"]
        path, revision = chosen["path"], chosen.get("revision")
        if chosen.get("train") == "full":
            whole = adapter
        else:
            lora = str(adapter)
    settings = None if lora is None else LoraSettings(source=lora)
    policy = load_policy(path, device=device, dtype=dtype, lora=settings, train="none", revision=revision)
    if whole is not None:
        network = policy.denoiser
        trained = type(network).from_pretrained(whole, subfolder=policy.backbone.network_part)
        network.load_state_dict(trained.state_dict())
    return policy


def given_prompts(texts: Sequence[str], source: str | None, limit: int | None) -> list[Prompt]:
    """Prompts from the command line, from a source, or from both."""
    prompts = [Prompt(text, {"prompt": text}) for text in texts]
    if source is not None:
        prompts += load_prompts(source, limit=limit)
    if not prompts:
        raise UserError('no prompt given; expected --prompt "a red star" (any number of times) or --prompts FILE')
    return prompts


def check_new(out: str | Path) -> None:
    """Refuse a folder that holds samples. Cheap, so that it comes before a model is loaded."""
    if (Path(out) / LISTING).exists():
        raise UserError(f"{out} already holds samples; expected a new folder; choose another --out")


def sample(policy: Policy, prompts: Sequence[Prompt], settings: SampleSettings, out: str | Path) -> Path:
    """Draw images of all prompts into the folder `out`, with a listing and a sheet. Returns the folder."""
    from flowrl.sampling import generate
    from flowrl.sheets import save_png, sheet

    check_new(out)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows, shown = [], []
    for number, images in generate(policy, [prompt.text for prompt in prompts], settings):
        for index, image in enumerate(images):
            name = f"{number:05d}_{index:02d}.png"
            save_png(folder / name, image)
            rows.append({**prompts[number].metadata, "image": name, "prompt_id": number, "index": index})
        if number < 16:
            shown.append((prompts[number].text, list(images[:4])))
    (folder / LISTING).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    columns = len(shown[0][1])
    sheet(
        [images for _, images in shown],
        row_captions=[text for text, _ in shown],
        column_titles=[f"image {i}" for i in range(columns)],
    ).save(folder / "sheet.png")
    return folder
