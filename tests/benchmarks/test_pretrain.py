"""The pretraining of the models in the box: its data, its three trainings in miniature, and the folders that ship."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import launched
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import flowrl
from benchmarks.pretrain import clip, data, diffusion, export, flow, heads, loop, vae
from benchmarks.pretrain.__main__ import app
from benchmarks.pretrain.assemble import assemble, assemble_sd, save_half, save_half_clip
from benchmarks.pretrain.captions import SEEN, captions, near_misses, true_of
from benchmarks.pretrain.cards import clip_card, sd3_card, sd_card
from benchmarks.pretrain.measure import weights_hash
from benchmarks.pretrain.text import MAX_LENGTH, TextEncoders, silent_t5, token_ids, words, write_tokenizer
from flowrl.distributed import World
from flowrl.errors import UserError
from reward_models.clip_score import ClipScore
from reward_models.shapes.grammar import SPLITS, TASKS, prompts, seen_colours
from reward_models.shapes.render import Scene, Shape

MODELS = Path(flowrl.__file__).parent / "models"
STAGES = ("vae", "flow", "sd", "clip")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# ---------------------------------------------------------------------------------------------------------------- data
def test_a_batch_is_a_function_of_seed_purpose_and_step():
    metadata, pictures = data.scene_batch(3, 1, 7, 4)
    again = data.scene_batch(3, 1, 7, 4)
    assert again[0] == metadata and torch.equal(again[1], pictures)
    assert pictures.shape == (4, 3, 64, 64) and 0 <= pictures.min() and pictures.max() <= 1
    for other in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        assert not torch.equal(data.scene_batch(*other, 4)[1], pictures)


def test_task_shares_are_a_distribution_over_all_tasks():
    assert set(data.TASK_SHARES) == set(TASKS)
    assert math.isclose(sum(data.TASK_SHARES.values()), 1)


def test_held_out_combinations_are_never_shown():
    held_out = {m["prompt"].split(" of ", 1)[1] for m in prompts("held_out")}
    shown = {m["prompt"].split(" of ", 1)[1] for table in data.seen_prompts().values() for m in table}
    assert held_out and not held_out & shown
    for step in range(20):
        texts, scenes, alone = clip.draw_batch(np.random.default_rng([5, step]), 32)
        assert len(texts) == len(scenes) == 32
        assert not held_out & {*texts, *alone}
        assert all(shape.colour in seen_colours(shape.name) for scene in scenes for shape in scene.shapes)
    assert not held_out & {miss for text in captions() for kind in near_misses(text).values() for miss in kind}


# ---------------------------------------------------------------------------------------------------------------- text
def test_every_word_of_the_grammar_is_one_token_and_the_longest_prompt_fits(tokenizer):
    for word in words():
        assert len(tokenizer(word)["input_ids"]) == 3, word  # start, the word, end
    for metadata in (m for split in SPLITS for m in prompts(split)):
        assert len(tokenizer(metadata["prompt"])["input_ids"]) == 2 + len(metadata["prompt"].split()) <= MAX_LENGTH
    assert token_ids(tokenizer, ["a star"]).shape == (1, MAX_LENGTH)


def test_an_unknown_word_falls_apart_into_known_pieces(tokenizer):
    ids = tokenizer("zebra")["input_ids"][1:-1]
    assert len(ids) > 1 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "zebra"


def test_the_third_text_encoder_says_exactly_nothing():
    torch.manual_seed(0)
    model, t5_tokenizer = silent_t5()
    out = model(torch.randint(len(t5_tokenizer), (3, MAX_LENGTH)))[0]
    assert out.shape == (3, MAX_LENGTH, 128) and (out == 0).all()


# ------------------------------------------------------------------------------------------------------------ training
class Killed(Exception):
    pass


def _train(stage, folder, tokenizer, autoencoder, steps=3, world=loop.ALONE):
    if stage == "vae":
        return vae.train(folder, steps=steps, batch=2, save_every=1, world=world)
    if stage in ("flow", "sd"):
        g = torch.Generator().manual_seed(0)
        ids = token_ids(tokenizer, [m["prompt"] for m in prompts("train", per_task=2)][:8]).short()
        latents = {"latents": torch.randn(8, vae.LATENT_CHANNELS, 8, 8, generator=g).half(), "ids": ids}
        latents |= {"shift": torch.tensor(-0.05), "scale": torch.tensor(1.2)}
        train = flow.train if stage == "flow" else diffusion.train
        return train(latents, tokenizer, folder, steps=steps, batch=4, save_every=1, world=world)
    return clip.train(folder, tokenizer, autoencoder, steps=steps, batch=8, save_every=1)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_training_goes_on_bit_for_bit(stage, tmp_path, tokenizer, monkeypatch):
    autoencoder = vae.build().eval()
    whole = _train(stage, tmp_path / "whole", tokenizer, autoencoder).state_dict()
    save = loop.save_checkpoint

    def save_and_die(folder, step, *rest):
        save(folder, step, *rest)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            _train(stage, tmp_path / "stopped", tokenizer, autoencoder)
    torch.manual_seed(99)  # a new process starts with other generators
    resumed = _train(stage, tmp_path / "stopped", tokenizer, autoencoder).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def _train_among(folder):
    """One of two processes; the first leaves its weights in the folder."""
    world = World.join("cpu")
    tokenizer = write_tokenizer(folder / f"tokenizer_{world.rank}")
    for stage in ("vae", "flow", "sd"):
        model = _train(stage, folder / stage, tokenizer, None, world=world)
        if world.main:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{stage}.safetensors")
    world.leave()


def test_two_processes_train_as_one_does(tmp_path, tokenizer):
    assert launched(_train_among, tmp_path) == [0, 0]
    models = {"flow": lambda: flow.TextToImage(tokenizer), "sd": lambda: diffusion.TextToNoise(tokenizer)}
    for stage, build in {"vae": vae.build, **models}.items():
        torch.manual_seed(0)
        start = build().state_dict()
        alone = _train(stage, tmp_path / "alone" / stage, tokenizer, None).state_dict()
        both = load_file(tmp_path / f"{stage}.safetensors")
        moved, apart = (
            sum((of[name] - alone[name]).float().square().sum().item() for name in alone) for of in (start, both)
        )
        assert apart < 0.1 * moved  # squared; products are bfloat16, and Adam's first steps follow signs


def test_one_zero_token_counted_256_times_is_256_zero_tokens(tokenizer):
    torch.manual_seed(0)
    model = flow.TextToImage(tokenizer)
    for p in model.parameters():
        if not p.any():  # modulations start at zero, and would hide the text
            torch.nn.init.normal_(p, std=0.1)
    x, s, ids = torch.randn(4, vae.LATENT_CHANNELS, 8, 8), torch.rand(4), torch.randint(40, (4, MAX_LENGTH))
    with torch.no_grad():
        got = model(x, s, ids, torch.tensor([0, 256, 256, 0]))
        states, pooled = model.text(ids)
        for zeros, rows in ((0, [0, 3]), (256, [1, 2])):
            tokens = torch.cat([states, states.new_zeros(4, zeros, states.shape[-1])], 1)
            want = model.transformer(x, tokens, pooled, 1000 * s, return_dict=False)[0]
            torch.testing.assert_close(got[rows], want[rows], rtol=0, atol=2e-5)
        assert (got - model(x, s, ids)).abs().amax((1, 2, 3))[[1, 2]].min() > 0.01  # the zeros do matter


def test_a_folder_of_another_run_is_refused_and_an_untrained_stage_is_not_exported(tmp_path, tokenizer):
    _train("clip", tmp_path / "clip", tokenizer, None)
    with pytest.raises(UserError, match="steps 3 .now 4"):
        _train("clip", tmp_path / "clip", tokenizer, None, steps=4)
    for name in ("vae", "flow"):
        with pytest.raises(UserError, match=f"{name} holds no checkpoint"):
            export._finished(torch.nn.Linear(1, 1), tmp_path / name)


def test_weights_never_ship_with_another_tokenizer_than_they_learned_with(tmp_path, tokenizer):
    _train("clip", tmp_path / "clip", tokenizer, None)
    export._finished(clip.Trainee(tokenizer), tmp_path / "clip", tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["hexagon"])
    with pytest.raises(UserError, match="was trained with vocabulary"):
        export._finished(clip.Trainee(tokenizer), tmp_path / "clip", other)


def test_noise_is_learned_from_latents_as_the_decoder_wants_them(tmp_path, tokenizer, monkeypatch):
    """x_t and the weights by hand: the latents lose the shift that pipelines of diffusion models do not add."""
    seen = {}

    def remember(model, loss, *_, **__):
        model.unet.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], t=args[1]))
        seen["loss"] = loss(0)
        return model.state_dict()

    monkeypatch.setattr(diffusion, "fit", remember)
    monkeypatch.setattr(diffusion, "UNCONDITIONAL", 0.0)
    ids = token_ids(tokenizer, ["a star"]).short()
    data_ = {"latents": torch.ones(1, vae.LATENT_CHANNELS, 8, 8).half(), "ids": ids}
    data_ |= {"shift": torch.tensor(-0.25), "scale": torch.tensor(2.0)}
    diffusion.train(data_, tokenizer, tmp_path, batch=6)
    g = torch.Generator().manual_seed(0)
    torch.randint(1, (6,), generator=g), torch.rand(6, 1, generator=g)
    e, t = torch.randn(6, vae.LATENT_CHANNELS, 8, 8, generator=g), torch.randint(1000, (6,), generator=g)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = (1 - betas).cumprod(0)[t]
    x = abar.sqrt().view(-1, 1, 1, 1) * 0.5 + (1 - abar).sqrt().view(-1, 1, 1, 1) * e  # 1 + 2 * (-0.25)
    assert torch.equal(seen["t"], t)
    torch.testing.assert_close(seen["x"], x)
    weights = torch.tensor([min(a / (1 - a), 5) * (1 - a) / a for a in abar.tolist()])
    value, parts = seen["loss"]  # the network says 0 at the start
    torch.testing.assert_close(value, (weights * e.square().mean((1, 2, 3))).mean())
    assert parts["error"] == pytest.approx(e.square().mean().item(), rel=1e-5)


def test_the_text_of_tiny_sd_starts_as_given_and_is_part_of_the_run(tmp_path, tokenizer):
    start = TextEncoders(tokenizer).layers_1.text_model.state_dict()
    data_ = {"latents": torch.zeros(4, vae.LATENT_CHANNELS, 8, 8).half(), "ids": token_ids(tokenizer, ["a star"] * 4)}
    data_ |= {"shift": torch.tensor(0.0), "scale": torch.tensor(1.0)}

    def run(**arguments):
        return diffusion.train(data_, tokenizer, tmp_path, steps=1, batch=2, lr=0.0, muon_lr=0.0, **arguments)

    found = run(text=start).text.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in start.items())
    with pytest.raises(UserError, match="holds a run with text"):
        run()


def test_a_unet_costs_about_what_the_transformer_costs():
    from torch.utils.flop_counter import FlopCounterMode

    x, t, text = torch.zeros(1, vae.LATENT_CHANNELS, 8, 8), torch.zeros(1), torch.zeros(1, MAX_LENGTH, 128)
    flops = []
    for call in (lambda: flow.build()(x, text, text[:, 0], t), lambda: diffusion.build()(x, t, text[..., :64])):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        flops.append(counter.get_total_flops())
    assert 0.5 < flops[1] / flops[0] < 2


def test_learning_rate_rises_in_200_steps_and_falls_as_a_cosine():
    assert loop.schedule(99, 10**9) == pytest.approx(0.5)
    assert loop.schedule(500, 1000) == pytest.approx(0.5)
    assert loop.schedule(750, 1000) == pytest.approx(0.5 * (1 - math.sqrt(0.5)))


def test_muon_gets_the_matrices_of_attention_and_feed_forward(tokenizer):
    model = flow.TextToImage(tokenizer)
    muon, adam = loop.optimizers(model, 1e-3, 2e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in (muon, adam))
    assert "transformer.transformer_blocks.0.attn.to_q.weight" in matrices
    assert "text.layers_1.text_projection.weight" in matrices
    assert {"text.layers_1.text_model.embeddings.token_embedding.weight", "transformer.proj_out.weight"} <= rest
    assert "transformer.transformer_blocks.0.norm1.linear.weight" in rest  # a modulation
    assert not matrices & rest and len(matrices | rest) == len(names)


def test_latents_are_those_of_the_scenes_in_their_order_and_go_on_where_they_were(tmp_path, tokenizer):
    torch.manual_seed(0)
    autoencoder = vae.build().eval().requires_grad_(False)
    found = load_file(flow.encode_latents(autoencoder, tokenizer, tmp_path, seed=3, scenes=8, batch=4))
    metadata, pictures = data.scene_batch(3, 3, 1, 4)  # the second batch
    expected = autoencoder.encode(2 * pictures - 1).latent_dist.mode()
    assert torch.equal(found["ids"][4:].long(), token_ids(tokenizer, [m["prompt"] for m in metadata]))
    unscaled = found["latents"][4:].float() / found["scale"] + found["shift"]
    assert (torch.cosine_similarity(unscaled.flatten(1), expected.flatten(1)) > 0.999).all()  # bfloat16 in between
    assert found["latents"].float().mean().abs() < 1e-3
    assert found["latents"].float().std() == pytest.approx(1, abs=1e-3)
    (tmp_path / "latents.safetensors").unlink()
    assert len(list(tmp_path.iterdir())) == 1  # the shard
    again = load_file(flow.encode_latents(autoencoder, tokenizer, tmp_path, seed=3, scenes=8, batch=4))
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_loss_of_the_autoencoder_weighs_outlines():
    picture = torch.ones(1, 3, 8, 8)
    picture[:, 0, :, 4:] = 0.25
    weights = vae.edge_weights(picture)[0, 0]
    assert torch.equal(weights[0], torch.tensor([1, 1, 1, 4, 4, 1, 1, 1.0]))  # 1 + 4 * 0.75 beside the step


# ---------------------------------------------------------------------------------------------------- captions of clip
def _scene(*shapes):
    return Scene(
        tuple(Shape(name, colour, x, y, 8.0, 0.0, (0, 0, 0)) for name, colour, x, y in shapes), (230, 230, 230)
    )


def test_near_misses_differ_in_one_thing():
    found = near_misses("a red star and a blue circle", SPLITS)
    assert set(found) == {"shape", "colour", "missing", "swap"}
    assert found["swap"] == ("a blue star and a red circle",)
    assert found["missing"] == ("a red star", "a blue circle")
    assert len(found["shape"]) == 8  # four other shapes for each
    assert len(found["colour"]) == 12  # seven other colours for each, less the colour of the other
    found = near_misses("a star left of a heart", SPLITS)
    assert found["swap"] == ("a heart left of a star",)
    assert {text.split("star ")[1] for text in found["relation"]} == {
        "right of a heart",
        "above a heart",
        "below a heart",
    }
    found = near_misses("two red stars", SPLITS)
    assert set(found["count"]) == {"three red stars", "four red stars", "a red star"}


def test_truth_of_captions_by_hand():
    pair = _scene(("star", "red", 10, 30), ("heart", "blue", 50, 34))  # the star is left of the heart
    slanted = _scene(("star", "red", 10, 10), ("heart", "blue", 50, 50))
    three = _scene(*(("star", "red", x, 30) for x in (10, 30, 50)))
    expected = {
        "a star and a heart": (True, True, False),
        "a heart and a star": (True, True, False),
        "a red star and a blue heart": (True, True, False),
        "a blue star and a red heart": (False, False, False),
        "a star": (False, False, False),  # leaves something out
        "a star left of a heart": (True, True, False),
        "a heart right of a star": (True, True, False),
        "a star right of a heart": (False, False, False),
        "a star above a heart": (False, True, False),  # unclear where slanted: not called false
        "three stars": (False, False, True),
        "three red stars": (False, False, True),
        "two red stars": (False, False, False),
        "four red stars": (False, False, False),
    }
    found = true_of(list(expected), [pair, slanted, three])
    for text, row in zip(expected, found.T, strict=True):
        assert tuple(row) == expected[text], text


def test_every_caption_of_a_batch_is_true_of_its_own_scene():
    texts, scenes, _ = clip.draw_batch(np.random.default_rng(1), 64)
    assert true_of(texts, scenes).diagonal().all()


# ---------------------------------------------------------------------------------------------------------------- clip
def test_contrast_by_hand():
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    true = torch.tensor([[True, False, True], [False, True, False]])  # the third caption is true of the first picture
    value, right = clip.contrast(image, text, torch.tensor(2.0), true)
    two, three = math.log(1 + math.exp(-2)), math.log(1 + 2 * math.exp(-2))
    # pictures: the first meets one false caption, the second two; captions: each meets one false picture
    assert value.item() == pytest.approx((two + three) / 4 + two / 2)
    assert right.item() == 1


def _sure(said, index):
    """Logits that are certain of the last index."""
    said[index[:-1]] = -50
    said[index] = 50


def test_heads_are_at_their_minimum_when_they_say_what_is_there():
    scene = _scene(("star", "red", 20, 20), ("star", "blue", 50, 50), ("heart", "black", 48, 16))
    patches = torch.full((1, 64, 16), -50.0)
    patches[..., 6], patches[..., 15] = 50, 50  # ground
    centres = [(4 + 8 * (i % 8), 4 + 8 * (i // 8)) for i in range(64)]
    for shape, x, y, colour in ((3, 20, 20, 0), (3, 50, 50, 4), (5, 48, 16, 7)):
        for i, (a, b) in enumerate(centres):
            if math.hypot(a - x, b - y) < 0.8 * 8:
                patches[0, i] = -50
                patches[0, i, shape], patches[0, i, 7 + colour] = 50, 50
    assert heads.patch_loss(patches, [scene], 8).item() == pytest.approx(0, abs=1e-6)
    assert heads.patch_loss(patches.roll(1, 1), [scene], 8).item() > 1
    counts = torch.zeros(1, 6, 5)
    for shape, count in enumerate((0, 0, 0, 2, 0, 1)):
        _sure(counts, (0, shape, count))
    colours = torch.full((1, 6, 8), -50.0)
    colours[0, 3, 0], colours[0, 3, 4], colours[0, 5, 7] = 50, 50, 50
    places = torch.full((1, 6, 2), 7.0)  # not asked for: two stars have no one place
    places[0, 5] = torch.tensor([0.5, -0.5])  # 48 and 16 of 64 pixels
    assert heads.scene_loss((counts, colours, places), [scene]).item() == pytest.approx(0, abs=1e-6)
    places[0, 5, 0] = 0.0
    assert heads.scene_loss((counts, colours, places), [scene]).item() == pytest.approx(0.25)


def test_heads_read_what_a_caption_claims():
    texts = ["a star above a heart", "a red star and a blue heart"]
    counts, colours, places = torch.zeros(2, 6, 5), torch.full((2, 6, 8), -50.0), torch.zeros(2, 6, 2)
    for row in (0, 1):
        for shape, count in enumerate((0, 0, 0, 1, 0, 1)):
            _sure(counts, (row, shape, count))
    colours[1, 3, 0], colours[1, 5, 4] = 50, 50
    places[0, 3, 1], places[0, 5, 1] = -0.45, 0.45  # y downwards
    said = [captions(SPLITS)[text] for text in texts]
    assert heads.caption_loss((counts, colours, places), said).item() == pytest.approx(0, abs=1e-6)
    assert heads.caption_loss((counts, colours, -places), said).item() == pytest.approx(1.8**2)
    swapped = colours.clone()
    swapped[1, 3], swapped[1, 5] = colours[1, 5], colours[1, 3]
    assert heads.caption_loss((counts, swapped, places), said).item() == pytest.approx(2 * 2 * 50 / 8)


def test_augmentation_is_seeded_and_mild():
    pictures = data.scene_batch(0, 1, 0, 8)[1]
    autoencoder = vae.build().eval()
    for through in (None, autoencoder):
        first, second = (clip.augment(pictures, through, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second) and 0 <= first.min() and first.max() <= 1
    plain = clip.augment(pictures, None, torch.Generator().manual_seed(3))
    assert 0.001 < (plain - pictures).abs().mean() < 0.12
    flat = torch.full((1, 3, 8, 8), 0.4)
    assert torch.allclose(clip.blur(flat), flat)


# ------------------------------------------------------------------------------------------------------------- folders
@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    pipeline = assemble(flow.TextToImage(tokenizer), vae.build(), tokenizer, shift=0.05, scale=0.9)
    return save_half(pipeline, tmp_path_factory.mktemp("model") / "tiny-sd3")


def test_the_assembled_folder_loads_and_samples_with_no_extra_argument(sd3_folder):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert (pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor) == (0.05, 0.9)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a red star", num_inference_steps=2).images[0].size == (64, 64)
    assert export.megabytes(sd3_folder) < export.MOST_MB["tiny-sd3"]


def test_the_policy_sees_the_text_as_the_training_did(sd3_folder, tokenizer):
    from transformers import CLIPTextModelWithProjection

    policy = flowrl.load_policy(sd3_folder, train="none")
    prompt = "a photo of two red stars"
    encoders = TextEncoders(tokenizer)
    for name in ("text_encoder", "text_encoder_2"):
        loaded = CLIPTextModelWithProjection.from_pretrained(sd3_folder / name)
        (encoders.layers_1 if name == "text_encoder" else encoders.layers_2).load_state_dict(loaded.state_dict())
    transformer = flow.build()
    loaded = type(transformer).from_pretrained(sd3_folder, subfolder="transformer")
    g = torch.Generator().manual_seed(0)
    x, s = torch.randn(2, vae.LATENT_CHANNELS, 8, 8, generator=g), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        states, pooled = encoders(token_ids(tokenizer, [prompt] * 2))
        expected = loaded(x, states, pooled, 1000 * s, return_dict=False)[0]
        found = policy.predict(x, s, policy.encode([prompt] * 2))
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_assembled_tiny_sd_loads_in_plain_diffusers_and_as_a_policy(tmp_path, tokenizer):
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    model = diffusion.TextToNoise(tokenizer)
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.05)
    folder = save_half(assemble_sd(model, vae.build(), tokenizer, scale=0.9), tmp_path / "tiny-sd")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    assert (pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor) == (None, 0.9)
    assert export.megabytes(folder) < export.MOST_MB["tiny-sd"]
    pipe.set_progress_bar_config(disable=True)
    policy, prompt = flowrl.load_policy(folder, train="none"), "a photo of a red star"
    assert policy.resolution == 64 and policy.sigmas(8)[-1] == 0
    x = torch.randn(1, vae.LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipe(prompt, num_inference_steps=2, guidance_scale=3.0, latents=x, output_type="pt").images
    cond, (first, second, _) = policy.encode([prompt]), policy.sigmas(2).tolist()
    with torch.no_grad():
        z = x * policy.prior_std(first)
        z = z + (second - first) * policy.predict(z, torch.tensor([first]), cond, 3.0)
        z = z - second * policy.predict(z, torch.tensor([second]), cond, 3.0)
        torch.testing.assert_close(policy.decode(z), theirs, atol=1e-4, rtol=0)
        # the text is what the training saw
        ids = token_ids(tokenizer, [prompt])
        plain = diffusion.TextToNoise(tokenizer)
        plain.text.load_state_dict(pipe.text_encoder.state_dict())
        torch.testing.assert_close(cond.rows["embeds"], plain.text(ids).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_the_clip_folder_loads_as_a_plain_model_and_as_a_judge(tmp_path, tokenizer):
    from transformers import AutoTokenizer, CLIPModel

    torch.manual_seed(0)
    trainee = clip.Trainee(tokenizer).eval()
    folder = save_half_clip(trainee.model(), tokenizer, tmp_path / "tiny-clip")
    model = CLIPModel.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 1_300_000
    assert export.megabytes(folder) < export.MOST_MB["tiny-clip"]
    texts = ["a photo of a red star", "a drawing of two hearts"]
    assert AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    pictures = data.scene_batch(0, 1, 0, 2)[1]
    with torch.no_grad():
        image, text, _ = trainee.half().float()(pictures, token_ids(tokenizer, texts))
    expected = torch.cosine_similarity(image, text)
    assert torch.allclose(ClipScore(folder).score(pictures, texts, []).values, expected, atol=1e-4)


@pytest.mark.parametrize("name", export.MOST_MB)
def test_what_ships_is_small_and_its_card_says_what_was_measured(name):
    folder = MODELS / name
    if not folder.exists():
        pytest.skip(f"{name} is not in this checkout")
    assert export.megabytes(folder) <= export.MOST_MB[name]
    facts = json.loads((folder / "measured.json").read_text())
    assert facts["weights"] == weights_hash(folder)
    card = {"tiny-sd3": sd3_card, "tiny-sd": sd_card, "tiny-clip": clip_card}[name]
    assert (folder / "README.md").read_text() == card(facts)


# -------------------------------------------------------------------------------------------------------- command line
def test_the_card_of_tiny_sd_can_be_written():
    facts = json.loads((MODELS / "tiny-sd3" / "measured.json").read_text())
    facts["parameters"] = {"unet": 2_883_464, "text": 118_016, "vae": 951_395}
    facts["training"]["sd"] = {**facts["training"]["flow"], "text": "0123", "batch": 128}
    text = sd_card(facts)
    assert "2,883,464" in text and "noise" in text and "min(SNR, 5) / SNR" in text and "{" not in text.split("```")[2]


@pytest.mark.parametrize("verb", ["vae", "latents", "flow", "sd", "clip", "export", "all"])
def test_every_verb_has_an_example(verb):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and f"-m benchmarks.pretrain {verb}" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latents", "--scenes", "300"], "a multiple of 256; try 256"),
        (["latents"], "holds no checkpoint"),
        (["flow"], "run the stage latents first"),
        (["sd"], "run the stage latents first"),
        (["export"], "holds no trained flow, sd or clip"),
        (["export", "--only", "tiny-sd3"], "holds no trained tiny-sd3"),
        (["vae", "--device", "tpu"], "expected 'auto', 'cpu'"),
    ],
)
def test_what_is_missing_is_said(arguments, message, tmp_path):
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output


def test_seen_captions_are_those_of_train_and_test():
    assert SEEN == ("train", "test")
