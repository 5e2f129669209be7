"""A reward that learns beside the policy, as Adv-GRPO's discriminator does (arXiv 2511.20256), in the common loop.

    rollout -> the reward's own steps on these images against references -> scores -> the policy's update

Who learns when is a function of `reward_models.turns`. All processes hold the same reward: they gather each other's
images (as uint8) in the order of the prompts and make the same steps, so that a run does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowrl.distributed import World
from flowrl.errors import UserError
from flowrl.prompts import Prompt
from flowrl.schema import AdversaryConfig
from flowrl.scores import everyones
from reward_models.protocol import Reward, checked_score
from reward_models.references import References, load_references, read_images, seed_of
from reward_models.turns import Turn, alternate, trigger

SHAPES = "shapes:draw"  # references in place of files: the renderer of the Shapes world


@runtime_checkable
class Trainable(Protocol):
    """A reward that learns: what `reward_models.adversarial.AdversarialReward` offers."""

    def update(self, fakes: Tensor, reals: Tensor, key: int, *, prompts: list[str] | None = None,
               real_prompts: list[str] | None = None, steps: int = 1) -> dict[str, float]: ...  # fmt: skip

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def trainable_parts(reward: Reward) -> Iterator[Reward]:
    """The rewards inside a reward (sums, combinations, transforms; itself) that learn."""
    if isinstance(reward, Trainable):
        yield reward
    inner = [getattr(reward, "reward", None), *getattr(reward, "rewards", {}).values()]
    for part in filter(None, inner):
        yield from trainable_parts(part)


class Source(Protocol):
    """Where reference images come from."""

    def __call__(self, prompt: Prompt, count: int, key: int, size: tuple[int, int]) -> Tensor:
        """(count, 3, H, W) in [0, 1] for a prompt, a function of (prompt, key)."""
        ...


def reference_source(text: str, prompts: Sequence[Prompt] = (), limit: int | None = None, seed: int = 0) -> Source:
    """A folder of images, a manifest of files by prompt (see `reward_models.references`), or "shapes:draw".

    Args:
        prompts: that it must serve.
        limit: references that are used at most, of each prompt in a manifest, chosen by the seed.

    Raises:
        UserError: nothing is there, a manifest of another form, or one without images of some of the prompts.
    """
    if text == SHAPES:
        if limit is not None:
            raise UserError(
                f"got adversary.limit {limit} with references {SHAPES}, which are drawn anew each time; expected a "
                "folder or a manifest; remove limit"
            )
        return _rendered
    try:
        found = load_references(text)
        found = found if limit is None else found.subset(limit, seed)
    except ValueError as error:
        raise UserError(f"adversary.references: {error}") from error
    if lacking := [prompt.text for prompt in prompts if not found.of(prompt.text)]:
        raise UserError(
            f"adversary.references: {text} has no images of {len(lacking)} of {len(prompts)} prompts, such as "
            f"{lacking[0]!r}; expected some of each; add them, or give a folder that serves all prompts"
        )
    return lambda prompt, count, key, size: _read(found, prompt, count, key, size)


def _read(references: References, prompt: Prompt, count: int, key: int, size: tuple[int, int]) -> Tensor:
    try:
        return read_images(references.draw(prompt.text, count, key), size)
    except ValueError as error:
        raise UserError(f"adversary.references: {error}") from error


def _rendered(prompt: Prompt, count: int, key: int, size: tuple[int, int]) -> Tensor:
    """Right pictures of a Shapes prompt, drawn anew for every key."""
    import numpy as np

    from reward_models.shapes.grammar import parse
    from reward_models.shapes.render import render, sample_scene

    metadata = prompt.metadata if "include" in prompt.metadata else parse(prompt.text)
    if not metadata or "include" not in metadata or size[0] != size[1]:
        raise UserError(
            f"adversary.references is {SHAPES} and the prompt {prompt.text!r}, images of {size[0]} x {size[1]} px; "
            "expected square images of a prompt of the Shapes world; name a folder or a manifest of references"
        )
    rng = np.random.default_rng(seed_of(key, "shapes", prompt.text))
    pictures = np.stack([render(sample_scene(metadata, rng), size[0]) for _ in range(count)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@dataclass
class Adversary:
    """The reward that learns, its references and its schedule; its state is the reward's."""

    reward: Any  # a Reward that is Trainable
    source: Source
    settings: AdversaryConfig
    seed: int

    @staticmethod
    def make(
        settings: AdversaryConfig | None, reward: Reward, seed: int, prompts: Sequence[Prompt] = ()
    ) -> Adversary | None:
        """The adversary that a config asks for, or None. prompts: those that it will meet.

        Raises:
            UserError: a reward that learns without the section, the section without such a reward, two of them, or
                references that do not serve the prompts.
        """
        learning = list(trainable_parts(reward))
        if settings is None and not learning:
            return None
        if settings is None or len(learning) != 1:
            names = ", ".join(one.spec.name for one in learning) or "none"
            raise UserError(
                f"got {'an' if settings else 'no'} adversary section and these rewards that learn: {names}; expected "
                "the section and exactly one; write adversary: {references: FOLDER} beside reward: {adversarial: 1.0}"
            )
        source = reference_source(settings.references, prompts, settings.limit, seed)
        return Adversary(learning[0], source, settings, seed)

    def learn(
        self, update: int, images: Tensor, place: Tensor, prompts: Sequence[Prompt], world: World
    ) -> tuple[Turn, dict[str, float]]:
        """The reward's turn in an update; returns what is trained, and numbers to log.

        Args:
            update: finished updates.
            images: (N, 3, H, W) of this process, on the 8-bit grid.
            place: (N,) which of the update's prompts an image belongs to.
            prompts: of the update, all processes' together.
        """
        images, place, _ = everyones(images, place, world)
        key = seed_of(self.seed, "adversary", update)
        words = [prompts[i].text for i in place.tolist()]
        size, count = (images.shape[2], images.shape[3]), self.settings.per_prompt
        asked = list({prompt.text: prompt for prompt in prompts}.values())

        def references() -> tuple[Tensor, list[str]]:
            drawn = torch.cat([self.source(prompt, count, key, size) for prompt in asked])
            return drawn, [prompt.text for prompt in asked for _ in range(count)]

        turn, found = self._turn(update, images, words, references)
        if not turn.discriminator:
            return turn, {}
        reals, real_words = found or references()
        steps = turn.discriminator
        return turn, self.reward.update(images, reals, key, prompts=words, real_prompts=real_words, steps=steps)

    def _turn(
        self, update: int, images: Tensor, words: list[str], references: Callable[[], tuple[Tensor, list[str]]]
    ) -> tuple[Turn, tuple[Tensor, list[str]] | None]:
        """Whose turn it is, and the references if it took them to know."""
        s = self.settings
        if s.schedule == "alternate":
            return alternate(update, s.discriminator, s.generator, reuse=s.reuse), None
        found = references()
        mean_reference, mean_sample = (
            float(checked_score(self.reward, pictures, texts).values.nanmean())
            for pictures, texts in (found, (images, words))
        )
        return trigger(mean_reference, mean_sample, s.discriminator, reuse=s.reuse), found

    def state_dict(self) -> dict[str, Any]:
        """The reward's, see `reward_models.adversarial`."""
        return self.reward.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on bit for bit. UserError for a state of another reward."""
        try:
            self.reward.load_state_dict(state)
        except ValueError as error:
            raise UserError(str(error)) from error
