"""The adversarial reward of Adv-GRPO (arXiv 2511.20256): a discriminator between reference and generated images.

    R = 0.7 h(cls) + 0.3 mean_j h(patch_j),         L = l(h(cls)) + 0.3 l(h(patch_j))

with l one of (r of references, f of generated images, all means)

    hinge     [relu(1 - r) + relu(1 + f)] / 2
    bce       [softplus(-r) + softplus(f)] / 2      half of the paper's -E log R(r) - E log(1 - R(f)), R = sigmoid
    pairwise  softplus(f - r) over pairs            PickScore's two-way cross-entropy with labels 1 and 0

Differences from the published code, unless ``compat="adv_grpo"``: one path of features for training and scoring
(``critics``), all patches instead of 64 random ones, so that scoring an image twice gives one number, and a replay of
old generated images. In both: float32 where the code has bfloat16, and images are put on the 8-bit grid before scoring.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from .critics import Critic, Inputs, PreferenceCritic, TokenCritic
from .features import ImageFeatures, load_features
from .protocol import Metadata, RewardError, RewardResult, RewardSpec, to_8bit
from .references import seed_of
from .replay import Replay

FORMAT = 1  # of the state; raise it whenever a key comes, goes or changes its meaning
LOSSES = ("hinge", "bce", "pairwise")
ALARM_WINDOW = 10  # updates whose mean accuracy is held against the floor


def discriminator_loss(real: Tensor, fake: Tensor, kind: str, pairs: Tensor | None = None) -> Tensor:
    """One of the losses above.

    Args:
        real, fake: logits (n,) and (m,), or (n, M) and (m, M) of patches (for "pairwise" averaged over an image).
        kind: of ``LOSSES``.
        pairs: (n, m) bool, which of them "pairwise" compares; None: all. No pair gives 0.
    """
    if kind == "hinge":
        return (relu(1 - real).mean() + relu(1 + fake).mean()) / 2
    if kind == "bce":
        return (softplus(-real).mean() + softplus(fake).mean()) / 2
    real, fake = real.reshape(len(real), -1).mean(1), fake.reshape(len(fake), -1).mean(1)
    losses = softplus(fake[None] - real[:, None])
    if pairs is None:
        return losses.mean()
    return (losses * pairs).sum() / pairs.sum().clamp_min(1)


def accuracy(real: Tensor, fake: Tensor, kind: str, pairs: Tensor | None = None) -> float:
    """Mean of the shares of references above and generated images below 0; "pairwise": share of pairs in order."""
    if kind == "pairwise":
        right = (real[:, None] > fake[None]).float()
        return float(right.mean() if pairs is None else (right * pairs).sum() / pairs.sum().clamp_min(1))
    return float(((real > 0).float().mean() + (fake < 0).float().mean()) / 2)


class AdversarialReward:
    """How much an image looks like a reference to the present discriminator; an unbounded logit.

    ``update`` trains it; its version changes each time, as the numbers do. ``turns`` has schedules.

    Args:
        features: backbone, see ``features``. Tokens of DINOv2 ViT-B/14 at 518 px take 4.2 MB an image in an update.
        critic: "tokens" (a head on a frozen backbone) or "preference" (the last layers of a CLIP-type scorer; its
            reward is the score, and it needs prompts).
        loss: see above; None: "hinge" for tokens, "pairwise" for a preference model.
        lr: of Adam; None: 1e-4 or 5e-6, as published.
        betas: of Adam.
        hidden: width of the head.
        layers: trained layers of a preference model.
        patches: patches that the head sees; None: all (with compat 64).
        patch_weight: of the patches in the reward; CLS has the rest.
        patch_loss: weight of the patches in the loss.
        batch: references and generated images of one step, at most; None: all. "pairwise" with prompts: pairs.
        replay: old generated images that are remembered.
        replay_share: old ones added to the new ones of an update, as a share of these.
        floor: the alarm goes off where the mean accuracy of ten updates is below.
        seed: of all that is random here.
        compat: None, or "adv_grpo" for the published paths of features (see ``critics``), 64 patches and no replay.
        device: where to compute.
        chunk: images per forward of the backbone.

    Raises:
        ValueError: options that do not fit.
    """

    def __init__(
        self,
        features: str | Mapping[str, Any] | ImageFeatures = "dino",
        *,
        critic: Literal["tokens", "preference"] = "tokens",
        loss: str | None = None,
        lr: float | None = None,
        betas: tuple[float, float] = (0.5, 0.999),
        hidden: int = 512,
        layers: int = 2,
        patches: int | None = None,
        patch_weight: float = 0.3,
        patch_loss: float = 0.3,
        batch: int | None = None,
        replay: int = 64,
        replay_share: float = 0.25,
        floor: float = 0.6,
        seed: int = 0,
        compat: str | None = None,
        device: str | torch.device = "cpu",
        chunk: int = 32,
    ) -> None:
        loss = loss or ("hinge" if critic == "tokens" else "pairwise")
        _check(critic, loss, compat, patches, batch, replay_share, lr, hidden, patch_weight, patch_loss)
        if compat is not None:
            patches, replay = 64 if patches is None else patches, 0
        backbone = load_features(features, device, chunk)
        self.critic: Critic
        if critic == "tokens":
            self.critic = TokenCritic(backbone, hidden, patches, seed, compat)
        else:
            if isinstance(features, ImageFeatures):  # its layers are trained: not those of someone else
                raise ValueError("got a loaded backbone for critic 'preference', expected its name. It would change.")
            self.critic = PreferenceCritic(backbone, layers)
        self.backbone, self.loss, self.seed, self.batch = backbone, loss, seed, batch
        self.patch_weight, self.patch_loss = patch_weight, patch_loss
        self.replay, self.replay_share, self.floor = Replay(replay), replay_share, floor
        rate = lr or (1e-4 if critic == "tokens" else 5e-6)
        self.optimizer = torch.optim.Adam(self.critic.modules.parameters(), lr=rate, betas=(betas[0], betas[1]))
        self.updates, self._recent, self._frozen = 0, list[float](), backbone.version
        self._patches = "all patches" if patches is None else f"{patches} random patches"
        self._compat = f", as {compat}" if compat else ""
        self._describe()

    def _describe(self) -> None:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.critic.modules.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.spec = RewardSpec(
            name=f"adversarial-{self.backbone.name}",
            version=f"{self._frozen}-{self.updates}-{digest.hexdigest()[:12]}",
            licence=self.backbone.licence,
            preprocessing=f"{self.backbone.prepare}; {self._patches}{self._compat}",
            differentiable=True,
        )

    # ---- scoring

    def _reward(self, whole: Tensor, patches: Tensor | None) -> Tensor:
        if patches is None:
            return whole
        return (1 - self.patch_weight) * whole + self.patch_weight * patches.mean(1)

    def _scored(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rewards (N,), logits of whole images (N,) and means over patches (N,) or None."""
        generator = self._generator("score", self.updates)  # one choice of patches until the next update
        found = []
        start = generator.get_state()
        for i in range(0, len(images), self.backbone.chunk):
            if not self._compat:
                generator.set_state(start)  # the same places whatever the chunk; published: drawn on
            part = slice(i, i + self.backbone.chunk)
            inputs = self.critic.inputs(images[part].to(self.backbone.device), prompts[part], False)
            found.append(self.critic.logits(inputs, generator, False))
        whole = torch.cat([w for w, _ in found])
        patches = [p for _, p in found if p is not None]
        if not patches:
            return whole, whole, None
        every = torch.cat(patches)
        return self._reward(whole, every), whole, every.mean(1)

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,)."""
        return self._scored(images, prompts)[0]

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read. Parts: "cls" and "patches" of a head."""
        if not len(images):
            names = ("cls", "patches") if isinstance(self.critic, TokenCritic) else ()
            return RewardResult(torch.zeros(0), {name: torch.zeros(0) for name in names})
        values, whole, patches = self._scored(images, prompts)
        parts = {} if patches is None else {"cls": whole.cpu(), "patches": patches.cpu()}
        return RewardResult(values.cpu(), parts)

    # ---- training

    def update(
        self,
        fakes: Tensor,
        reals: Tensor,
        key: int,
        *,
        prompts: list[str] | None = None,
        real_prompts: list[str] | None = None,
        steps: int = 1,
    ) -> dict[str, float]:
        """Train on generated and reference images.

        Args:
            fakes: (N, 3, H, W) in [0, 1].
            reals: (R, 3, H', W') in [0, 1].
            key: names this update; all draws are a function of it.
            prompts: of the fakes; needed by a preference model. "pairwise" then compares images of one prompt only.
            real_prompts: of the references; None: the same as `prompts`, for as many references.
            steps: of Adam.

        Returns:
            Numbers to log. Before training, so on images that the discriminator has not learned yet: accuracy (its
            share of right answers), accuracy_real, accuracy_fake, logit_real, logit_fake (means), reward_real,
            reward_fake, gap (their difference). After: accuracy_after, gap_after. loss (mean over the steps), replay
            (images remembered), accuracy_recent (mean of ten updates), alarm (1 where that is below the floor).

        Raises:
            ValueError: images or prompts that do not fit.
            RewardError: the loss is not finite; that step was not made.
        """
        real_prompts = _check_update(fakes, reals, prompts, real_prompts, steps)
        self.replay.check(fakes)
        count = round(self.replay_share * len(fakes))
        old, old_prompts = self.replay.draw(count, key)
        mixed = to_8bit(fakes) if not len(old) else torch.cat([to_8bit(fakes), old.to(fakes.device)])
        mixed_prompts = None if prompts is None else [*prompts, *(p or "" for p in old_prompts)]
        with torch.no_grad():
            real = self._inputs(to_8bit(reals), real_prompts)
            fake = self._inputs(mixed, mixed_prompts)
        pairs = _pairs(real_prompts, mixed_prompts, self.backbone.device) if self.loss == "pairwise" else None
        before = self._health(real, fake, pairs, len(fakes))
        loss = sum(self._step(real, fake, pairs, key, step) for step in range(steps)) / steps
        self.updates += 1
        self._recent = [*self._recent, before["accuracy"]][-ALARM_WINDOW:]
        self.replay.add(fakes, prompts, key)
        self._describe()
        after = self._health(real, fake, pairs, len(fakes))
        recent = sum(self._recent) / len(self._recent)
        alarm = len(self._recent) == ALARM_WINDOW and recent < self.floor
        return before | {
            "accuracy_after": after["accuracy"], "gap_after": after["gap"], "loss": loss,
            "replay": float(len(self.replay)), "accuracy_recent": recent, "alarm": float(alarm),
        }  # fmt: skip

    def _generator(self, *names: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, *names))

    def _inputs(self, images: Tensor, prompts: list[str] | None) -> Inputs:
        return self.critic.inputs(images.to(self.backbone.device), prompts, True)

    def _health(self, real: Inputs, fake: Inputs, pairs: Tensor | None, new: int) -> dict[str, float]:
        """Metrics of the new fakes (the first ones) against all references."""
        with torch.no_grad():
            generator = self._generator("health", self.updates)
            (r, r_patches), (f, f_patches) = (
                self.critic.logits(x, generator, True) for x in (real, tuple(x[:new] for x in fake))
            )
            rewards = float(self._reward(r, r_patches).mean()), float(self._reward(f, f_patches).mean())
        return {
            "accuracy": accuracy(r, f, self.loss, None if pairs is None else pairs[:, :new]),
            "accuracy_real": float((r > 0).float().mean()),
            "accuracy_fake": float((f < 0).float().mean()),
            "logit_real": float(r.mean()),
            "logit_fake": float(f.mean()),
            "reward_real": rewards[0],
            "reward_fake": rewards[1],
            "gap": rewards[0] - rewards[1],
        }

    def _step(self, real: Inputs, fake: Inputs, pairs: Tensor | None, key: int, step: int) -> float:
        generator = self._generator("step", key, step)
        i, j = _minibatch(len(real[0]), len(fake[0]), self.batch, pairs, generator)
        r, r_patches = self.critic.logits(tuple(x[i] for x in real), generator, True)
        f, f_patches = self.critic.logits(tuple(x[j] for x in fake), generator, True)
        chosen = None if pairs is None else pairs[i][:, j]
        loss = discriminator_loss(r, f, self.loss, chosen)
        if r_patches is not None and f_patches is not None:
            loss = loss + self.patch_loss * discriminator_loss(r_patches, f_patches, self.loss, chosen)
        if not math.isfinite(loss.item()):
            raise RewardError(
                f"{self.spec.name}: the discriminator's loss is {loss.item()} at update {self.updates}, expected a "
                "finite number. Lower its lr, or look for broken images."
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that changes, nested, of tensors, numbers, strings, lists: safetensors and JSON hold it."""
        return copy.deepcopy(
            {
                "format": FORMAT,
                "backbone": self._frozen,
                "updates": self.updates,
                "recent": self._recent,
                "modules": dict(self.critic.modules.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "replay": self.replay.state_dict(),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on bit for bit from a state of an equally built reward.

        Raises:
            ValueError: another format or backbone, or weights that do not fit.
        """
        if (state["format"], state["backbone"]) != (FORMAT, self._frozen):
            raise ValueError(
                f"got a discriminator's state of format {state['format']} for backbone {state['backbone']}, expected "
                f"{FORMAT} and {self._frozen}. Build the reward as it was built when the state was saved."
            )
        try:
            self.critic.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"got a discriminator's state that does not fit ({error}). Build the reward with the same options."
            ) from error
        self.replay.load_state_dict(state["replay"])
        self.updates, self._recent = int(state["updates"]), list(state["recent"])
        self._describe()


def _minibatch(
    reals: int, fakes: int, size: int | None, pairs: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Numbers of the references and of the generated images of a step; all of them in order where they fit.

    Where only images of one prompt are compared, pairs are drawn: drawn apart, few of the images would find a partner.
    """
    if size is None or size >= max(reals, fakes):
        return torch.arange(reals), torch.arange(fakes)
    if pairs is None:
        return torch.randperm(reals, generator=generator)[:size], torch.randperm(fakes, generator=generator)[:size]
    every = pairs.cpu().nonzero()
    i, j = every[torch.randperm(len(every), generator=generator)[:size]].T
    return i.unique(), j.unique()


def _pairs(real: list[str] | None, fake: list[str] | None, device: torch.device) -> Tensor | None:
    """(R, N) bool: equal prompts; None where there are no prompts. Raises ValueError where no pair is left."""
    if real is None or fake is None:
        return None
    if not set(real) & set(fake):
        raise ValueError("got references that share no prompt with the generated images. Draw them for these prompts.")
    return torch.tensor([[a == b for b in fake] for a in real], device=device)


def _check(
    critic: str, loss: str, compat: str | None, patches: int | None, batch: int | None, share: float,
    lr: float | None, hidden: int, patch_weight: float, patch_loss: float,
) -> None:  # fmt: skip
    faults = {
        f"critic {critic!r}": critic in ("tokens", "preference"),
        f"loss {loss!r}": loss in LOSSES,
        f"compat {compat!r}": compat is None or (compat == "adv_grpo" and critic == "tokens"),
        f"patches {patches}": patches is None or patches > 0,
        f"batch {batch}": batch is None or batch > 0,
        f"replay_share {share}": 0 <= share,
        f"lr {lr}": lr is None or lr > 0,
        f"hidden {hidden}": hidden > 0,
        f"patch_weight {patch_weight}": 0 <= patch_weight <= 1,
        f"patch_loss {patch_loss}": patch_loss >= 0,
    }
    wrong = [fault for fault, fine in faults.items() if not fine]
    if wrong:
        raise ValueError(
            f"got {', '.join(wrong)}, expected critic tokens or preference, loss {', '.join(LOSSES)}, compat None or "
            "(with tokens) adv_grpo, positive numbers, and a patch_weight in [0, 1]. Correct the options."
        )


def _check_update(
    fakes: Tensor, reals: Tensor, prompts: list[str] | None, real_prompts: list[str] | None, steps: int
) -> list[str] | None:
    """The prompts of the references, after checking what `update` was given."""
    for what, images in (("generated", fakes), ("reference", reals)):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not len(images):
            raise ValueError(
                f"got {what} images of shape {tuple(images.shape)} and dtype {images.dtype}, expected floats "
                "(N, 3, H, W) in [0, 1], at least one. Divide 8-bit images by 255."
            )
        if not bool(images.isfinite().all()):
            raise ValueError(f"got {what} images with NaN or infinite pixels, expected finite ones. Leave them out.")
    if steps < 1:
        raise ValueError(f"got {steps} steps, expected at least 1. Do not call update where it is not its turn.")
    if prompts is None:
        return None
    real_prompts = prompts if real_prompts is None else real_prompts
    if len(prompts) != len(fakes) or len(real_prompts) != len(reals):
        raise ValueError(
            f"got {len(prompts)} prompts for {len(fakes)} generated and {len(real_prompts)} for {len(reals)} reference "
            "images, expected one each. Pass real_prompts where there are not as many references."
        )
    return real_prompts
