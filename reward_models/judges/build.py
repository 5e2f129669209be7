"""From what a config says to judges: one function for each name under which ``reward_models.load`` knows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..loading import load
from ..protocol import Reward
from . import grammars, wording
from .endpoint import ChatEndpoint
from .listener import EndpointListener, ListenerAudit
from .pairwise import EndpointPairJudge, Order, PairJudge, ScorerJudge
from .pointwise import PointJudge, TwoQuestionScore
from .unigenbench import UniGenBench
from .win_rate import WinRate

Where = str | Mapping[str, Any] | ChatEndpoint
Aggregate = Literal["win_rate", "bradley_terry", "flex"]


def open_endpoint(where: Where, model: str | None = None, **defaults: Any) -> ChatEndpoint:
    """An endpoint from its URL, or from a mapping of ``ChatEndpoint``'s options.

    Args:
        where: URL, mapping with at least ``url``, or an endpoint, which is returned as it is.
        model: name of the model, unless the mapping has it.
        defaults: options that the mapping may override.

    Raises:
        ValueError: unknown or missing options.
    """
    if isinstance(where, ChatEndpoint):
        return where
    options: dict[str, Any] = {**defaults, **({"url": where} if isinstance(where, str) else where)}
    if model is not None:
        options.setdefault("model", model)
    try:
        inspect.signature(ChatEndpoint).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"got endpoint {where!r} and model {model!r}, expected a URL and a model's name, or a mapping of the "
            f"options {inspect.signature(ChatEndpoint)} ({error}). Correct them."
        ) from error
    return ChatEndpoint(**options)


def _chosen(what: str, value: str, table: Mapping[str, Any]) -> Any:
    if value not in table:
        raise ValueError(f"got {what} {value!r}, expected one of {', '.join(table)}. Correct it.")
    return table[value]


def _check_compat(compat: str | None, *allowed: str) -> None:
    if compat is not None and compat not in allowed:
        raise ValueError(f"got compat {compat!r}, expected {' or '.join(map(repr, allowed)) or 'none'}. Correct it.")


def _check_no_pairs(mode: str, opponents: Any, order: Any, aggregate: Any, listener: Any) -> None:
    if (opponents, order, aggregate) != ("all", None, "win_rate") or listener is not None:
        raise ValueError(
            f"got opponents, order, aggregate or a listener with mode {mode!r}, which rates images one by one, "
            "expected them with a mode that compares two. Leave them out, or change the mode."
        )


def as_judge(judge: Any, device: str | torch.device = "cpu", threshold: float = 0.0) -> PairJudge:
    """A pairwise judge from whatever a config or a program names as one.

    Args:
        judge: a ``PairJudge``; a reward; or what ``reward_models.load`` takes. Of a win rate its judge is taken, any
            pointwise reward judges by its score.
        device: where a learned reward computes.
        threshold: of a pointwise reward: scores that differ by no more tie.

    Raises:
        ValueError: it cannot compare two images.
    """
    if isinstance(judge, Mapping) and len(judge) == 1:
        (name, options), *_ = judge.items()
        if isinstance(options, Mapping) and "weight" not in options:  # a reward with options, no sum
            judge = load(name, device, **options)
    if isinstance(judge, str | Mapping):
        judge = load(judge, device)
    if isinstance(judge, WinRate):
        return judge.judge
    if isinstance(judge, PairJudge):
        return judge
    if isinstance(judge, Reward):
        return ScorerJudge(judge, threshold)
    raise ValueError(
        f"got judge {judge!r} of type {type(judge).__name__}, expected an object with compare(), a reward, or a "
        "reward's name."
    )


def _audited(judge: PairJudge, listener: Any, device: str | torch.device) -> PairJudge:
    if listener is None:
        return judge
    if isinstance(listener, Mapping) and "endpoint" in listener:
        return ListenerAudit(judge, build_listener(**listener))
    return ListenerAudit(judge, listener if hasattr(listener, "hear") else as_judge(listener, device))


def build_listener(
    *, endpoint: Where, model: str | None = None, template_path: str | Path | None = None
) -> EndpointListener:
    """A listener that hears the judge's reasons without its verdict."""
    return EndpointListener(open_endpoint(endpoint, model), wording.load("listener", template_path))


def win_rate(
    *,
    judge: Any,
    opponents: Literal["all"] | int = "all",
    order: Order | None = None,
    aggregate: Aggregate = "win_rate",
    threshold: float = 0.0,
    listener: Any = None,
    seed: int = 0,
    prior: float = 0.1,
    compat: Literal["pref_grpo"] | None = None,
    device: str | torch.device = "cpu",
) -> WinRate:
    """Win rate by any judge: a reward's name, ``{name: {option: value}}`` or an object; see ``WinRate``.

    ``listener`` is a second judge, named in the same way, or ``{endpoint: ..., model: ...}`` for one that hears the
    first one's reasons.
    """
    chosen = _audited(as_judge(judge, device, threshold), listener, device)
    return WinRate(chosen, opponents=opponents, order=order, aggregate=aggregate, seed=seed, prior=prior, compat=compat)


def unified_reward(
    *,
    endpoint: Where,
    model: str = "UnifiedReward",
    mode: Literal["point", "acs", "pair_rank", "pair_score"] = "point",
    template_path: str | Path | None = None,
    weights: Mapping[str, float] | None = None,
    opponents: Literal["all"] | int = "all",
    order: Order | None = None,
    aggregate: Aggregate = "win_rate",
    listener: Any = None,
    seed: int = 0,
    compat: Literal["flow_grpo", "pref_grpo"] | None = None,
    device: str | torch.device = "cpu",
) -> PointJudge | WinRate:
    """UnifiedReward (arXiv 2503.05236).

    Args:
        endpoint: URL, or a mapping of ``ChatEndpoint``'s options.
        model: name under which the server knows it.
        mode: "point": a final score in [1, 5]; "acs": mean of alignment, coherence and style, each in [1, 5];
            "pair_rank", "pair_score" (2.0): the win rate among the images of a prompt.
        template_path: the original wording, instead of ours.
        weights: of the three axes, for "acs".
        opponents, order, aggregate, listener, seed: see ``win_rate``, for pairs.
        device: where a learned listener computes.
        compat: "flow_grpo" for "point": value / 5, 0 without a score, images stretched to 512 x 512; "pref_grpo" for
            "acs": a missing axis takes the batch's mean.
    """
    _chosen("mode", mode, dict.fromkeys(("point", "acs", "pair_rank", "pair_score")))
    _check_compat(compat, *{"point": ("flow_grpo",), "acs": ("pref_grpo",)}.get(mode, ()))
    opened, told = open_endpoint(endpoint, model), wording.load(f"unified_reward_{mode}", template_path)
    if mode in ("point", "acs"):
        _check_no_pairs(mode, opponents, order, aggregate, listener)
    if weights is not None and mode != "acs":
        raise ValueError(f"got weights with mode {mode!r}, expected them with mode 'acs'. Leave them out.")
    if mode == "point":
        released = compat == "flow_grpo"
        return PointJudge(
            opened,
            told,
            lambda text: {"score": grammars.final_score(text, "flow_grpo" if released else None)},
            name="unified-reward",
            range=(0.0, 1.0) if released else (1.0, 5.0),
            form="png512" if released else "png",
        )
    if mode == "acs":
        released = compat == "pref_grpo"
        if unknown := set(weights or {}) - set(grammars.ACS_AXES):
            raise ValueError(f"got weights of {sorted(unknown)}, expected some of {', '.join(grammars.ACS_AXES)}.")
        return PointJudge(
            opened,
            told,
            partial(grammars.acs_scores, compat="pref_grpo" if released else None),
            name="unified-reward acs",
            range=(0.0, 6.0) if released else (1.0, 5.0),
            weights=weights,
            form="jpeg" if released else "png",
            complete=grammars.fill_axes if released else None,
        )
    parse = grammars.pair_rank if mode == "pair_rank" else grammars.pair_scores
    judge = _audited(EndpointPairJudge(opened, told, parse, name=f"unified-reward {mode}"), listener, device)
    return WinRate(judge, opponents=opponents, order=order, aggregate=aggregate, seed=seed)


def unified_reward_think(
    *,
    endpoint: Where,
    model: str = "UnifiedReward",
    reasoning: bool = True,
    template_path: str | Path | None = None,
    opponents: Literal["all"] | int = "all",
    order: Order | None = None,
    aggregate: Literal["win_rate", "bradley_terry"] = "win_rate",
    listener: Any = None,
    seed: int = 0,
    compat: Literal["pref_grpo"] | None = None,
    device: str | torch.device = "cpu",
) -> WinRate:
    """Win rate by UnifiedReward-Think (arXiv 2505.03318), the judge of Pref-GRPO.

    Without ``reasoning`` the judge is told to answer at once. ``compat="pref_grpo"``: the released round, grammar,
    rounding and JPEG; see ``WinRate`` and ``grammars.think_verdict`` (temperature 0 is sent all the same).
    """
    _check_compat(compat, "pref_grpo")
    told = wording.load("unified_reward_think" + ("" if reasoning else "_direct"), template_path)
    judge = EndpointPairJudge(
        open_endpoint(endpoint, model),
        told,
        partial(grammars.think_verdict, compat=compat),
        name="unified-reward-think",
        form="jpeg" if compat else "png",
    )
    return WinRate(
        _audited(judge, listener, device),
        opponents=opponents,
        order=order,
        aggregate=aggregate,
        seed=seed,
        compat=compat,
    )


def unified_reward_flex(
    *,
    endpoint: Where,
    model: str = "UnifiedReward",
    template_path: str | Path | None = None,
    opponents: Literal["all"] | int = "all",
    order: Order | None = None,
    category_weights: Mapping[str, float] | None = None,
    overall_weight: float = 1.0,
    category_weight: float = 1.0,
    listener: Any = None,
    seed: int = 0,
    compat: Literal["pref_grpo"] | None = None,
    device: str | torch.device = "cpu",
) -> WinRate:
    """UnifiedReward-Flex: overall win rate and the mean of its category win rates, see ``flex_rewards``.

    Categories are ``semantic``, ``quality`` and ``aesthetics``; with ``compat="pref_grpo"`` the names the judge wrote.
    """
    _check_compat(compat, "pref_grpo")
    if unknown := set() if compat else set(category_weights or {}) - set(grammars.FLEX_CATEGORIES):
        raise ValueError(f"got category weights of {sorted(unknown)}, expected some of {grammars.FLEX_CATEGORIES}.")
    judge = EndpointPairJudge(
        open_endpoint(endpoint, model),
        wording.load("unified_reward_flex", template_path),
        partial(grammars.flex_verdict, compat=compat),
        name="unified-reward-flex",
        form="jpeg" if compat else "png",
    )
    return WinRate(
        _audited(judge, listener, device),
        opponents=opponents,
        order=order,
        aggregate="flex",
        seed=seed,
        category_weights=category_weights,
        overall_weight=overall_weight,
        category_weight=category_weight,
        compat=compat,
    )


def edit_score(
    *,
    endpoint: Where,
    model: str = "EditScore",
    passes: int = 1,
    reduction: Literal["overalls", "means"] = "overalls",
    template_path: str | Path | None = None,
    quality_template_path: str | Path | None = None,
    compat: Literal["editscore"] | None = None,
) -> TwoQuestionScore:
    """EditScore (arXiv 2509.23909), in [0, 10]: the prompt is the instruction, the metadata hold ``source``.

    With several passes and no temperature in ``endpoint``, its own of 0.7 is taken.
    """
    _check_compat(compat, "editscore")
    told = wording.load("edit_score_semantic", template_path), wording.load("edit_score_quality", quality_template_path)
    opened = open_endpoint(endpoint, model, temperature=0.7 if passes > 1 else 0.0)
    return TwoQuestionScore(
        opened, *told, name="edit-score", high=25.0, edit=True, passes=passes, reduction=reduction, compat=compat
    )


def viescore(
    *,
    endpoint: Where,
    model: str | None = None,
    passes: int = 1,
    template_path: str | Path | None = None,
    quality_template_path: str | Path | None = None,
) -> TwoQuestionScore:
    """VIEScore for text to image (arXiv 2312.14867), in [0, 10]."""
    told = wording.load("viescore_semantic", template_path), wording.load("edit_score_quality", quality_template_path)
    opened = open_endpoint(endpoint, model, temperature=0.7 if passes > 1 else 0.0)
    return TwoQuestionScore(opened, *told, name="viescore", high=10.0, edit=False, passes=passes)


def vlm_judge(
    *,
    endpoint: Where,
    model: str | None = None,
    mode: Literal["point", "aesthetic", "pair", "four_way"] = "point",
    reasoning: bool | None = None,
    template_path: str | Path | None = None,
    grammar: str | None = None,
    opponents: Literal["all"] | int = "all",
    order: Order | None = None,
    aggregate: Literal["win_rate", "bradley_terry"] = "win_rate",
    listener: Any = None,
    seed: int = 0,
    compat: Literal["flow_grpo"] | None = None,
    device: str | torch.device = "cpu",
) -> PointJudge | WinRate:
    """Any vision-language model as a judge.

    Args:
        endpoint: URL, or a mapping of ``ChatEndpoint``'s options.
        model: name under which the server knows it, unless the mapping has it.
        mode: "point": how well the image shows the prompt, in [1, 5]; "aesthetic": its beauty in five levels, the
            prompt is not read; "pair": win rate among the images of a prompt; "four_way": the same with the question of
            GenAI-Bench, in which a tie says whether both are good or both are bad.
        reasoning: True: the judge is asked to reason, and the switch of hybrid reasoners is sent (see
            ``ChatEndpoint``); False: it is to answer at once, and the switch is sent; None: to answer at once, and no
            switch is sent.
        template_path: own wording.
        grammar: of the answer to it: "final_score", "score_tag", "pair_rank", "answer_tag" or "four_way".
        opponents, order, aggregate, listener, seed: see ``win_rate``, for pairs.
        device: where a learned listener computes.
        compat: "flow_grpo" for "aesthetic": value / 5, 0 without a score.
    """
    defaults = {"point": "final_score", "aesthetic": "score_tag", "pair": "pair_rank", "four_way": "four_way"}
    default = _chosen("mode", mode, defaults)
    _check_compat(compat, *(("flow_grpo",) if mode == "aesthetic" else ()))
    opened = open_endpoint(endpoint, model, thinking=reasoning)
    shipped = mode if mode == "aesthetic" else f"vlm_{mode}" + ("" if reasoning else "_direct")
    told = wording.load(shipped, template_path)
    if mode in ("pair", "four_way"):
        verdicts = {
            "pair_rank": grammars.pair_rank,
            "answer_tag": grammars.think_verdict,
            "four_way": grammars.four_way,
        }
        parse: Callable[[str], grammars.Verdict] = _chosen("grammar", grammar or default, verdicts)
        judge = _audited(EndpointPairJudge(opened, told, parse, name=f"vlm-judge {opened.model}"), listener, device)
        return WinRate(judge, opponents=opponents, order=order, aggregate=aggregate, seed=seed)
    _check_no_pairs(mode, opponents, order, aggregate, listener)
    numbers = {"final_score": grammars.final_score, "score_tag": grammars.score_tag}
    read: Callable[..., float] = _chosen("grammar", grammar or default, numbers)
    return PointJudge(
        opened,
        told,
        lambda text: {"score": read(text, compat)},
        name=f"vlm-judge {opened.model}" + (" aesthetic" if mode == "aesthetic" else ""),
        range=(0.0, 2.0) if compat else (1.0, 5.0),
    )


def unigenbench(
    *,
    endpoint: Where,
    model: str | None = None,
    language: Literal["en", "zh"] = "en",
    template_path: str | Path | None = None,
    definitions_path: str | Path | None = None,
    attempts: int = 1,
    compat: Literal["published"] | None = None,
) -> UniGenBench:
    """Share of its prompt's test points that an image passes, see ``UniGenBench``."""
    _check_compat(compat, "published")
    return UniGenBench(
        open_endpoint(endpoint, model),
        language=language,
        template_path=template_path,
        definitions_path=definitions_path,
        attempts=attempts,
        compat=compat,
    )
