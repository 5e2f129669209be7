"""The model cards: prose written here, every number from the measurements."""

from __future__ import annotations

from typing import Any

from .captions import SEEN
from .clip import ALONE, GROUP, LATENT_NOISE, LAYERS, WIDTH
from .data import TASK_SHARES
from .diffusion import CHANNELS, SNR_LIMIT
from .diffusion import UNCONDITIONAL as NO_PROMPT
from .flow import PADDED, UNCONDITIONAL, ZERO_TOKENS
from .vae import LATENT_CHANNELS

Table = dict[str, Any]


def interval(entry: Table) -> str:
    low, high = entry["ci95"]
    return f"{entry['mean']:.3f}" if low is None else f"{entry['mean']:.3f} [{low:.3f}, {high:.3f}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _minutes(stage: Table) -> str:
    return f"{stage['seconds'] / 60:.0f}"


def _shares() -> str:
    return ", ".join(f"{task} {share:.0%}" for task, share in TASK_SHARES.items())


def _scores_table(scores: list[Table]) -> str:
    rows = [["all tasks (mean of the tasks)", *(interval(s["scores"]["shapes"]) for s in scores)]]
    for task in scores[0]["tasks"]:
        rows.append([task, *(interval(s["tasks"][task]) if task in s["tasks"] else "none" for s in scores)])
    return table(["task", *(f"{s['split']}, {s['steps']} steps, guidance {s['guidance']:g}" for s in scores)], rows)


def sd3_card(facts: Table) -> str:
    """README.md of tiny-sd3 from its ``measured.json``."""
    stages, size = facts["training"], facts["parameters"]
    scores, plain, vae = facts["scores"], facts["plain"], facts["vae"]
    shares, right = _shares(), vae["detector_right"]
    parts = [
        [
            f"transformer: MMDiT, 4 blocks of width 160; 8x8x{LATENT_CHANNELS} latents in patches of 2 are 16 tokens",
            "transformer",
        ],
        [
            "two CLIP text encoders, 3 layers of width 64, whose tokenizer gives each word of the grammar one token",
            "text",
        ],
        [f"autoencoder, 8x smaller, {LATENT_CHANNELS} channels", "vae"],
        ["a T5 that always says 0, because the pipeline class wants a third text encoder", "t5"],
    ]
    vae_stage, flow_stage = stages["vae"], stages["flow"]
    names = {"autoencoder": vae_stage, f"text encoders and transformer, {flow_stage['scenes']:,} latents": flow_stage}
    steps = [[k, str(v["done"]), str(v["batch"]), _minutes(v), v["on"]] for k, v in names.items()]
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, flowrl, shapes]
---

# tiny-sd3

A true `StableDiffusion3Pipeline`, small enough to sit in a package: it draws scenes of the Shapes world (six shapes,
eight colours, 64x64 pixels) from GenEval-like prompts. It is made to be aligned: good, but with room to improve.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("flowrl/models/tiny-sd3")
pipe("a photo of a red star and a blue circle", num_inference_steps=20, guidance_scale=1.0).images[0]
```

## What is inside

{table(["part", "parameters"], [[name, f"{size[key]:,}"] for name, key in parts])}

Stored in fp16 ({facts["megabytes"]:.1f} MB in all); it loads in float32.

## How it was made

All data are scenes rendered from the Shapes grammar; no picture and no text came from anywhere else. Prompts are those
of the splits {" and ".join(SEEN)}; held-out combinations were never shown. Shares of the tasks: {shares}.

```
{facts["command"]}
```

{table(["stage", "steps", "batch", "minutes", "on"], steps)}

The flow loss is the squared error of the velocity, with the noise level from a logit-normal (Esser et al. 2024);
{UNCONDITIONAL:.0%} of the prompts were empty, and {PADDED:.0%} were followed by the {ZERO_TOKENS} zero tokens that the
plain pipeline appends. Seed {flow_stage["seed"]}; EMA weights.

## What it scores

GenEval's official decision with the rule-based Shapes detector: share of right pictures, with 95 % intervals
(bootstrap over prompts). {scores[0]["images_per_prompt"]} pictures of each prompt, ODE sampler; guidance 1 is none.

{_scores_table(scores)}

Plain `pipe(prompt)` (with the zero tokens), {plain["split"]} prompts, {plain["steps"]} steps, no guidance:
{interval(plain)} over {plain["prompts"]} prompts, one picture each.

Autoencoder: mean absolute error {vae["l1"]:.4f} of the pixel range; the detector finds what the prompt says in
{interval(right["rendered"])} of rendered scenes and in {interval(right["reconstructed"])} of their reconstructions
({vae["scenes"]} scenes).

## Limits

It knows the words of the Shapes grammar and nothing else: other words fall apart into characters without meaning.
It draws 64x64 pixels; one or two kinds of shapes, up to four of a kind. Its scores say nothing about other models.
No people, places or texts occur in it.

Licence: Apache-2.0, weights and data. Weights {facts["weights"]}; numbers in `measured.json`.
"""


def sd_card(facts: Table) -> str:
    """README.md of tiny-sd from its ``measured.json``."""
    stages, size = facts["training"], facts["parameters"]
    scores, plain, vae = facts["scores"], facts["plain"], facts["vae"]
    right = vae["detector_right"]
    wide, narrow = CHANNELS
    parts = [
        [f"UNet: {wide} channels at 8x8, {narrow} at 4x4, four attention blocks over 16 tokens", f"{size['unet']:,}"],
        ["a CLIP text encoder, 3 layers of width 64, which starts as the first one of tiny-sd3", f"{size['text']:,}"],
        [f"the autoencoder of tiny-sd3, 8x smaller, {LATENT_CHANNELS} channels", f"{size['vae']:,}"],
    ]
    stage = stages["sd"]
    names = {"autoencoder": stages["vae"], f"text encoder and UNet, {stage['scenes']:,} latents": stage}
    steps = [[k, str(v["done"]), str(v["batch"]), _minutes(v), v["on"]] for k, v in names.items()]
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, flowrl, shapes]
---

# tiny-sd

A true `StableDiffusionPipeline` (UNet, predicts noise), small enough to sit in a package: it draws scenes of the Shapes
world (six shapes, eight colours, 64x64 pixels) from GenEval-like prompts. The sibling of tiny-sd3 for methods that are
made for such models: DDPO, DPOK, consistency distillation.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("flowrl/models/tiny-sd")
pipe("a photo of a red star and a blue circle", num_inference_steps=20, guidance_scale=1.0).images[0]
```

## What is inside

{table(["part", "parameters"], parts)}

Stored in fp16 ({facts["megabytes"]:.1f} MB in all); it loads in float32. Noise levels are those of Stable Diffusion
(1000 steps, scaled-linear); sampling begins at the noisiest of them (trailing spacing) and ends at the picture.

## How it was made

All data are scenes rendered from the Shapes grammar; no picture and no text came from anywhere else. Prompts are those
of the splits {" and ".join(SEEN)}; held-out combinations were never shown. Shares of the tasks: {_shares()}.

```
{facts["command"]}
```

{table(["stage", "steps", "batch", "minutes", "on"], steps)}

The loss is the squared error of the noise, weighted by min(SNR, {SNR_LIMIT:g}) / SNR (Hang et al. 2023), with uniform
steps; {NO_PROMPT:.0%} of the prompts were empty. Seed {stage["seed"]}; EMA weights.

## What it scores

GenEval's official decision with the rule-based Shapes detector: share of right pictures, with 95 % intervals
(bootstrap over prompts). {scores[0]["images_per_prompt"]} pictures of each prompt, DDIM (eta 0); guidance 1 is none.

{_scores_table(scores)}

Plain `pipe(prompt)`, {plain["split"]} prompts, {plain["steps"]} steps, no guidance:
{interval(plain)} over {plain["prompts"]} prompts, one picture each.

Autoencoder: mean absolute error {vae["l1"]:.4f} of the pixel range; the detector finds what the prompt says in
{interval(right["rendered"])} of rendered scenes and in {interval(right["reconstructed"])} of their reconstructions
({vae["scenes"]} scenes).

## Limits

It knows the words of the Shapes grammar and nothing else: other words fall apart into characters without meaning.
It draws 64x64 pixels; one or two kinds of shapes, up to four of a kind. Its scores say nothing about other models.
No people, places or texts occur in it.

Licence: Apache-2.0, weights and data. Weights {facts["weights"]}; numbers in `measured.json`.
"""


def clip_card(facts: Table) -> str:
    """README.md of tiny-clip from its ``measured.json``."""
    stage, size = facts["training"]["clip"], facts["parameters"]["all"]
    rows = [
        [split, task, str(e["prompts"]), f"{e['chance']:.2f}", interval(e["caption"]), interval(e["picture"])]
        for split, tasks in facts["retrieval"].items()
        for task, e in tasks.items()
    ]
    pairs = [[kind, str(entry["pairs"]), interval(entry)] for kind, entry in facts["pairs"].items()]
    judged = ""
    if "judge" in facts:
        strict, official = facts["judge"]["shapes-strict"], facts["judge"]["shapes"]
        found = [[k, *(interval(of[k]) if k in of else "none" for of in (strict, official))] for k in official | strict]
        judged = f"""
As a judge of generated pictures: how often, of two pictures that tiny-sd3 (weights {facts["judged"]}) drew for one
prompt, one right and one wrong, the right one has the higher cosine. Right by the strict decision means that just the
objects of the prompt are there; the official one forgives objects that nobody asked for, which this judge does not.

{table(["task", "right by the strict decision", "right by the official decision"], found)}
"""
    seen_through = stage.get("autoencoder", "tiny-sd3's autoencoder")
    through = (
        f"one group of each batch went through {seen_through}, with noise\nof up to {LATENT_NOISE} standard deviations "
        "in the latents"
        if stage["vae"]
        else "no autoencoder was used"
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, flowrl, shapes]
---

# tiny-clip

A true `CLIPModel` for the Shapes world (coloured shapes on a plain ground, 64x64 pixels). flowrl uses it as the judge
that training never sees, and as the feature in which the diversity of pictures is measured.

```python
from transformers import AutoTokenizer, CLIPModel

model = CLIPModel.from_pretrained("flowrl/models/tiny-clip")
tokenizer = AutoTokenizer.from_pretrained("flowrl/models/tiny-clip")
```

`preprocessor_config.json` holds the image mean and std; `reward_models.load("tiny-clip")` does all of it.

## How it was made

{size:,} parameters ({facts["megabytes"]:.1f} MB in fp16; it loads in float32): an image tower of {LAYERS} layers of
width {WIDTH} on 8x8 patches, a text tower of 3 layers of width 64 with its own word tokenizer.

```
{facts["command"]}
```

{stage["done"]} steps of {stage["batch"]} scenes, {_minutes(stage)} minutes on {stage["on"]}, seed {stage["seed"]}, EMA
weights. A batch is made of groups of up to {GROUP} captions that differ in one thing (colour, shape, count, relation,
swapped attributes, an object more or less), each with its own rendered picture; every picture also meets {ALONE} more
near-miss captions. Captions that happen to be true of another picture of the batch are left out of the loss. Heads that
name shape and colour in each patch, and read counts, colours and places from the features of pictures and captions,
helped during training and are not part of the model. Pictures were blurred (sigma up to 0.8), made noisy, and brighter
or darker; {through}.
Held-out combinations of the grammar were never shown, neither as pictures nor as captions.

## What it scores

Retrieval among near misses, on freshly rendered scenes. *caption*: a picture's caption scores above up to 8 captions
that differ in one thing; *picture*: a caption's picture scores above the pictures of those captions. 95 % intervals
over prompts.

{table(["split", "task", "prompts", "chance", "caption", "picture"], rows)}

Pairs of the true caption and one near miss, by what differs (both splits):

{table(["differs in", "pairs", "true one higher"], pairs)}
{judged}
## Limits

It judges pictures of the Shapes world, and means nothing elsewhere. It is no detector: differences between cosines of
one prompt tell more than cosines of different prompts. A caption that leaves an object of the picture out counts as
wrong for it, while GenEval's official decision forgives additional objects.

Licence: Apache-2.0, weights and data. Weights {facts["weights"]}; numbers in `measured.json`.
"""
