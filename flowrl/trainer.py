"""The training loop: prompts, plan, tree, images, rewards, advantages, objective, update.

`train` is the one loop of all online methods; a method is a choice of its parts (see the config). Everything random is
keyed by (seed, update, prompt, ...), so the state of a run is its weights, its optimizer and a few counters, and a
resumed run goes on bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

import samplers
from flowrl import evaluate as evaluation
from flowrl.advantages import Advantages
from flowrl.adversary import Adversary
from flowrl.assign import Assigned, assign
from flowrl.clock import TrainingClock
from flowrl.config import Config
from flowrl.distributed import World
from flowrl.errors import GuardStop, UserError
from flowrl.guards import require_finite
from flowrl.illusory import illusory
from flowrl.layer_tuning import LayerTuning, Progress, progress_targets
from flowrl.objectives import MetricMeans, Objective, old_decay
from flowrl.parts import keeps_sampling_weights, make_layer_tuning, make_objective
from flowrl.planning import make_plan
from flowrl.policies import LoraSettings, Policy, load_policy
from flowrl.prompts import Prompt, Slot, load_prompts, prompt_batch, split
from flowrl.rewards import ask_elsewhere, load_reward, named_in
from flowrl.run import Run, Stopped
from flowrl.schema import EvalConfig, NftOptions
from flowrl.scores import score_update
from flowrl.state import State
from flowrl.tree_sheet import picture
from flowrl.update import (
    Batch,
    RootConditioning,
    UpdateSettings,
    accumulate_gradients,
    check_on_policy,
    forwards_per_row,
    total_weight,
    with_halving,
)
from reward_models.image_stats import image_statistics, in_group_diversity
from reward_models.mixture import WeightedSum
from reward_models.protocol import Reward, RewardError, RewardResult, checked_score, to_8bit
from reward_models.schedule import at

# What ends a run in the middle of an update, after the last good state was saved.
FAILURES = (GuardStop, RewardError, UserError, torch.OutOfMemoryError)


def train(config: Config, resume: bool = False, policy: Policy | None = None) -> dict[str, Any]:
    """Run a config to its end and return its summary (also in `summary.json`).

    Args:
        config: from `flowrl.config.load_config`.
        resume: continue the run in `config.output_dir` from its newest intact checkpoint.
        policy: a policy made elsewhere (a `GaussianPolicy`, a model in memory); default `config.policy`'s.

    Raises:
        UserError: the input cannot be used. GuardStop: a guard stopped the run, its last good state is saved.
        Stopped: a signal ended it after saving; `exit_code` is 143 or 130.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    world = World.join(config.policy.device)
    with ExitStack() as stack:
        stack.callback(world.leave)
        prompts = load_prompts(**config.prompts.model_dump())
        ask_elsewhere(*named_in(config))
        reward = load_reward(config.reward, device=world.device)
        adversary = Adversary.make(config.adversary, reward, config.seed, prompts)
        scorers = _scorers(config, world)
        objective, layer_tuning = make_objective(config), make_layer_tuning(config)
        on_leaves = "leaves" in objective.needs
        judge = scorers.judge if scorers is not None else None
        specs = [scorer.spec for scorer in (reward, judge) if scorer is not None]
        run = stack.enter_context(Run.open(config, world, resume=resume, rewards=specs))
        policy = policy or _load_policy(config, objective, world, run)
        _check_fit(config, policy)
        state = State.create(config, policy, adversary)
        run.load(state, policy)
        run.encode_once(policy, prompts)
        if state.update == 0:
            run.evaluate(policy, scorers, "before")
            run.evaluate(policy, scorers, "before_guided")
            run.samples(policy, 0)
            run.save(state, policy)
        checked = not config.self_check.enabled or on_leaves  # without likelihoods there is no ratio to check
        clock = TrainingClock(config.clock, world, state.train_s)

        while state.update < config.updates and not _spent(config, state):
            started = time.perf_counter()
            clock.start()
            run.begin(state, policy)
            try:
                # roll out: one plan for the update, K images for each of this process's prompts
                objective = make_objective(config, state.update)
                if keep_weights := keeps_sampling_weights(config, objective):
                    policy.copy_weights("current", "old")
                slots = prompt_batch(len(prompts), config.prompts_per_update, config.seed, state.update)
                mine = split(list(enumerate(slots)), world.rank, world.size)
                sigmas = policy.sigmas(config.rollout.steps, config.rollout.height, config.rollout.width)
                plan = make_plan(config, sigmas, state.update, state.success)
                roots = [(place, slot) for place, slot in mine for _ in range(plan.roots(config.group_size))]
                sampling = policy.weights("old") if on_leaves else nullcontext()
                with world.together(), torch.no_grad(), sampling:
                    cond = _encode(policy, prompts, roots)
                    tree = _rollout(config, policy, plan, state.update, roots, cond, run, keep_weights)
                    cost = _sampled(tree.cost, policy.calls(config.rollout.guidance))
                    leaves = tree.leaves.flatten(0, 1).split(run.chunk)
                    images = torch.cat([to_8bit(policy.decode(part)).cpu() for part in leaves])

                # score: images on the 8-bit grid, each group whole on this process; a reward may learn from them first
                chosen = [prompts[slot.prompt] for _, slot in roots for _ in plan.leaves]
                place = torch.tensor([place for place, _ in roots])
                groups = place.repeat_interleave(len(plan.leaves))
                where = f"update {state.update + 1}"
                require_finite({"the latents": tree.leaves, "the images": images}, where, world.max)
                asked = [prompts[slot.prompt] for slot in slots]
                policy_learns, learned = _adversary_turn(state, images, groups, asked, world, run)
                result = score_update(at(reward, state.update), images, groups, asked, world)
                rollout_s = time.perf_counter() - started

                # credit: from leaves to edges
                rewards = result.values.cpu().view(len(roots), len(plan.leaves))
                found = _assign(config, plan, rewards, _raw_parts(config, reward, result), roots, state, world)
                progress = _progress(config, policy, layer_tuning, tree, cond, rewards, place, state, world, run)
                batch = _batch(config, tree, cond, found, place, progress)
                if _tree_due(config, plan, state):
                    with clock.paused(), world.together():
                        if world.main:
                            _draw_tree(config, policy, tree, cond, images, rewards, found, chosen, state, run)
                values = _measure(
                    result, found.advantages, images, chosen, groups, judge, config.advantage.floor, world
                )
                if not checked:
                    state.ratio_max_dev = max(state.ratio_max_dev or 0.0, _self_check(config, policy, batch, world))
                    checked = True

                # update: inner steps, each on its share of the prompts
                metrics, norms = MetricMeans(), []
                before = tree.cost.sampling_calls  # not counted: what the self-check, once per session, grew again
                rate, parts = state.set_learning_rate(config), config.optimizer.inner_updates
                for inner in range(config.optimizer.epochs * parts if policy_learns else 0):
                    on_policy = inner == 0 and (not on_leaves or _old_decay(config, state.update - 1) == 0)
                    settings = _update_settings(config, on_policy, inner // parts)
                    norm, used = _inner_update(
                        config, policy, batch, inner % parts, objective, settings, state, world, metrics, run
                    )
                    norms += [] if norm is None else [norm]
                    cost += used
                again = tree.cost.sampling_calls - before
                cost += samplers.Cost(again * policy.calls(config.rollout.guidance))
                if on_leaves and policy_learns:
                    policy.copy_weights("current", "old", decay=_old_decay(config, state.update))
            except (*FAILURES, Stopped):
                run.save_last_good(state, policy)
                raise
            state.update += 1
            state.cost += _over_processes(cost, world)
            state.history = found.history
            _follow_success(config, state, rewards, world)
            trained_before, state.train_s = state.train_s, clock.stop()

            # log, look, save
            values |= learned | metrics.result(world.sum, world.max)
            values |= _totals(state.cost)
            values |= {"grad_norm": sum(norms) / len(norms) if norms else float("nan"), "lr": rate}
            alarms = state.alarms.add(state.update, values)
            if config.eval and _eval_due(config.eval, state, trained_before):
                values |= run.evaluate_now(policy, scorers)
            if config.logging.samples_every and state.update % config.logging.samples_every == 0:
                run.samples(policy, state.update)
            seconds = time.perf_counter() - started
            count = config.prompts_per_update * config.group_size
            timings = {"images_per_s": count / seconds, "rollout_s": rollout_s, "update_s": seconds - rollout_s}
            timings |= {"train_s": state.train_s}
            run.write(state.update, values, timings, alarms)
            signalled = run.signalled()
            due = bool(config.checkpoint.every) and state.update % config.checkpoint.every == 0
            stopping = bool(alarms) and config.alarms.stop
            if due or signalled or stopping or state.update == config.updates or _spent(config, state):
                run.save(state, policy)
            if stopping:
                raise GuardStop(f"alarms.stop is set, and {alarms[0]}")
            if signalled:
                raise run.stopped()

        run.evaluate(policy, scorers, "after")
        return run.finish(state, policy)


# ------------------------------------------------------------------------------------------------ parts of an update
def _check_fit(config: Config, policy: Policy) -> None:
    """UserError for image sizes and times that the policy does not have: now, not after the first evaluation."""
    for section in (config.rollout, config.eval):
        if section is not None:
            policy.latent_shape(section.height, section.width)
    r = config.rollout
    make_plan(config, policy.sigmas(r.steps, r.height, r.width), 0)


def _load_policy(config: Config, objective: Objective, world: World, run: Run) -> Policy:
    p = config.policy
    targets = None if p.lora.targets is None else tuple(p.lora.targets)
    return load_policy(
        p.path,
        dtype=p.dtype,
        device=str(world.device),
        quantize=p.quantize,
        attention=p.attention,
        gradient_checkpointing=p.gradient_checkpointing,
        lora=LoraSettings(p.lora.rank, p.lora.alpha, targets, p.lora.init, p.lora.start_from, config.seed),
        train=p.train,
        cache_dir=run.folder / "embeddings" if p.embedding_cache else None,
        revision=p.revision,
        reference=p.reference and "reference" in objective.needs,
    )


def _encode(policy: Policy, prompts: list[Prompt], roots: list[tuple[int, Slot]]) -> RootConditioning:
    """Conditioning of every root; each prompt is held once, however many images it has."""
    texts = list(dict.fromkeys(prompts[slot.prompt].text for _, slot in roots))
    row = {text: i for i, text in enumerate(texts)}
    return RootConditioning(policy.encode(texts), torch.tensor([row[prompts[slot.prompt].text] for _, slot in roots]))


def _rollout(
    config: Config, policy: Policy, plan: samplers.Plan, update: int, roots: list[tuple[int, Slot]],
    cond: RootConditioning, run: Run, keep_weights: bool,
) -> samplers.Tree:  # fmt: skip
    """The trees of these roots. keep_weights: the weights that sample are also those called "old"."""
    r, per_group = config.rollout, config.group_size // len(plan.leaves)
    keys = [
        samplers.Key(config.seed, "rollout", update, slot.prompt, slot.occurrence, k % per_group)
        for k, (_, slot) in enumerate(roots)
    ]

    def predict(x: Tensor, s: Tensor, index: Tensor) -> Tensor:
        return policy.predict(x, s, cond[index], r.guidance)

    # without noise there are no log-probs
    density = None if r.kernel == "ode" else samplers.Density(r.kernel, r.reduction, r.density)

    def sample(chunk: int) -> samplers.Tree:
        settings: dict[str, Any] = {
            "latent_shape": policy.latent_shape(r.height, r.width), "chunk": chunk, "device": policy.device,
            "density": density, "init_keys": _init_keys(config, keys), "prior_std": policy.prior_std(plan.s[0]),
            "on_chunk": lambda *_: run.check(),
        }  # fmt: skip
        if not r.recompute:
            return samplers.rollout(predict, plan, keys, **settings)
        parts = torch.tensor([place for place, _ in roots]) % config.optimizer.inner_updates
        return samplers.rollout_in_blocks(
            predict, plan, keys, samplers.regrow.root_blocks(plan, parts, chunk), **settings,
            sampling=lambda: policy.weights("old") if keep_weights else nullcontext(),
        )  # fmt: skip

    tree, run.chunk = with_halving(sample, run.chunk, "the rollout", run.note)
    return tree


def _adversary_turn(
    state: State, images: Tensor, place: Tensor, asked: list[Prompt], world: World, run: Run
) -> tuple[bool, dict[str, float]]:
    """Let a reward learn from the images of an update: (whether the policy learns from them too, numbers to log)."""
    if state.adversary is None:
        return True, {}
    before, run.committed = run.committed, True  # half of its steps are no boundary either
    turn, found = state.adversary.learn(state.update, images, place, asked, world)
    run.committed = before or turn.discriminator > 0
    return turn.generator, {f"adversary/{name}": value for name, value in found.items()}


def _assign(
    config: Config, plan: samplers.Plan, rewards: Tensor, parts: tuple[Tensor, Tensor] | None,
    roots: list[tuple[int, Slot]], state: State, world: World,
) -> Assigned:  # fmt: skip
    """Advantages and credit of this process's roots, in rows of (R, L)."""
    raw, weights = (None, None) if parts is None else (parts[0].view(-1, *rewards.shape), parts[1])
    per_group = plan.roots(config.group_size)
    place = torch.tensor([place for place, _ in roots], dtype=torch.long)
    return assign(
        config, plan, rewards, place,
        prompts=torch.tensor([slot.prompt for _, slot in roots], dtype=torch.long),
        rows=place * per_group + torch.arange(len(roots)) % per_group,
        total=config.prompts_per_update * per_group,
        history=state.history, reduce=world.sum, parts=raw, weights=weights,
    )  # fmt: skip


def _raw_parts(config: Config, reward: Reward, result: RewardResult) -> tuple[Tensor, Tensor] | None:
    """(K, N) raw rewards and (K,) weights, where advantages are to be made of each; None where of their sum."""
    if config.advantage.combine == "sum":
        return None
    assert isinstance(reward, WeightedSum)  # the config check asks for one
    used = {name: weight for name, weight in reward.weights.items() if weight}
    return torch.stack([result.parts[name] for name in used]), torch.tensor(list(used.values()), dtype=torch.float64)


def _progress(
    config: Config, policy: Policy, settings: LayerTuning | None, tree: samplers.Tree, cond: RootConditioning,
    rewards: Tensor, place: Tensor, state: State, world: World, run: Run,
) -> Progress | None:  # fmt: skip
    """What the states of this rollout are to imitate (LayerTuning-RL); None without it."""
    if settings is None:
        return None

    def predict(x: Tensor, s: Tensor, root: Tensor) -> Tensor:
        return policy.predict(x, s, cond[root], config.rollout.guidance)

    return progress_targets(
        settings, tree, rewards, place, update=state.update, predict=predict, chunk=run.micro_batch, reduce=world.sum
    )


def _batch(
    config: Config, tree: samplers.Tree, cond: RootConditioning, found: Assigned, place: Tensor,
    progress: Progress | None,
) -> Batch:  # fmt: skip
    root_part = place % config.optimizer.inner_updates
    edges = (tree.edges.root, tree.edges.node)
    return Batch(
        tree=tree,
        cond=cond,
        advantage=found.credit.advantages[edges].float(),
        weight=found.credit.weights[edges],
        group=place,
        part=root_part[tree.states.root],
        leaf_advantage=found.leaves.float(),
        root_part=root_part,
        progress=progress,
    )


def _update_settings(config: Config, on_policy: bool = True, epoch: int = 0) -> UpdateSettings:
    o = config.objective
    guidance = config.rollout.guidance if o.guidance is None else o.guidance
    return UpdateSettings(guidance, config.optimizer.micro_batch, o.kl.form, on_policy, epoch)


def _old_decay(config: Config, update: int) -> float:
    """How much of themselves the sampling weights of DiffusionNFT keep after the update of this number."""
    nft = config.objective.nft or NftOptions()
    return old_decay(max(0, update), nft.decay_rate, nft.decay_start, nft.decay_max)


def _tree_due(config: Config, plan: samplers.Plan, state: State) -> bool:
    """Whether the coming update is one to draw a tree of: the first one, and those with a sample sheet."""
    every = config.logging.samples_every
    return bool(every) and len(plan.leaves) > 1 and (state.update == 0 or (state.update + 1) % every == 0)


def _draw_tree(
    config: Config, policy: Policy, tree: samplers.Tree, cond: RootConditioning, images: Tensor, rewards: Tensor,
    found: Assigned, prompts: list[Prompt], state: State, run: Run,
) -> None:  # fmt: skip
    """The tree of the first root, `samples/trees/update_000020.png`, by the weights that grew it."""
    with torch.no_grad(), policy.weights("old") if config.objective.name == "nft" else nullcontext():
        picture(
            run.folder, state.update + 1, policy, tree, cond, config.rollout.guidance, images, rewards.flatten(),
            found.credit, prompts[0].text, init_keys=_init_keys(config, tree.keys), chunk=run.chunk,
        )  # fmt: skip


def _init_keys(config: Config, keys: Sequence[samplers.Key]) -> list[samplers.Key]:
    """Keys of the initial noise; images of a group with shared noise have one in common."""
    return [key._replace(root=None) for key in keys] if config.rollout.shared_noise else list(keys)


def _follow_success(config: Config, state: State, rewards: Tensor, world: World) -> None:
    """Move the average that levels follow: (mean - worst) / (best - worst) of the rewards of all processes (TMPO)."""
    driven = config.rollout.levels.reward_driven
    if driven is None:
        return
    known = rewards[~rewards.isnan()].double()
    total, count = world.sum(torch.stack([known.sum(), torch.tensor(float(len(known))).double()])).tolist()
    none = torch.tensor([-torch.inf], dtype=torch.float64)
    ends = torch.stack([torch.cat([known, none]).max(), torch.cat([-known, none]).max()])
    best, worst = world.max(ends).tolist()
    if count and best > -worst:
        success = (total / count + worst) / (best + worst)  # `worst` is minus the lowest reward
        state.success = driven.memory * state.success + (1 - driven.memory) * success


def _spent(config: Config, state: State) -> bool:
    return config.budget_s is not None and state.train_s >= config.budget_s


def _eval_due(section: EvalConfig, state: State, before: float) -> bool:
    """Whether this update is one after which to evaluate: by number, or by seconds of training (`before`: until it)."""
    by_number = bool(section.every) and state.update % section.every == 0
    return by_number or (section.every_s is not None and state.train_s // section.every_s > before // section.every_s)


def _self_check(config: Config, policy: Policy, batch: Batch, world: World) -> float:
    """Largest |ratio - 1| over all processes before the first optimizer step; GuardStop outside the bound."""
    check, exact = config.self_check, config.policy.dtype == "float32"
    low = min(config.objective.clip) if check.bound_low_precision is None else check.bound_low_precision
    bound = 0.0 if exact and world.device.type == "cpu" else check.bound if exact else low
    network = getattr(policy, "network", None)
    with world.together():
        deviation = check_on_policy(
            policy, batch, _update_settings(config).guidance, bound=bound, dtype=config.policy.dtype,
            modules=[] if network is None else [network],
        )  # fmt: skip
    return float(world.max(torch.tensor([deviation], dtype=torch.float64)))


def _inner_update(
    config: Config, policy: Policy, batch: Batch, part: int, objective: Objective, settings: UpdateSettings,
    state: State, world: World, metrics: MetricMeans, run: Run,
) -> tuple[float | None, samplers.Cost]:  # fmt: skip
    """Gradients of one share of the prompts and one optimizer step: (gradient norm or None, training calls)."""
    weight = total_weight(batch, part, objective)
    normaliser = float(world.sum(torch.tensor([weight], dtype=torch.float64)))

    def gradients(micro_batch: int) -> tuple[MetricMeans, int]:
        state.optimizer.zero_grad(set_to_none=True)
        return accumulate_gradients(
            policy, batch, part, objective, normaliser or 1.0, replace(settings, micro_batch=micro_batch),
            scale=state.scaler.scale, on_chunk=lambda _: run.check(),
        )  # fmt: skip

    with world.together():
        (found, used), run.micro_batch = with_halving(gradients, run.micro_batch, "the update", run.note)
    metrics.merge(found)
    parameters = [parameter for _, parameter in policy.trainable()]
    world.sum_gradients(parameters)
    norm = state.step(config, policy, parameters, world, loss=found.loss)
    run.committed = True  # from here on this update is finished before a signal is heard
    calls = policy.calls(1.0 if "leaves" in objective.needs else settings.guidance)  # leaves are matched without it
    again = 1 + objective.coupled  # a coupled objective looks at all edges before it back-propagates
    forwards = forwards_per_row(objective, settings) * again
    return norm, samplers.Cost(0, used * forwards * calls, used * calls, 0)


def _sampled(tree: samplers.Cost, calls: int) -> samplers.Cost:
    """Cost of a rollout, `calls` network rows each."""
    return samplers.Cost(tree.sampling_calls * calls, 0, 0, tree.images)


def _over_processes(cost: samplers.Cost, world: World) -> samplers.Cost:
    local = torch.tensor(list(asdict(cost).values()), dtype=torch.float64)
    return samplers.Cost(*(int(x) for x in world.sum(local).tolist()))


def _totals(cost: samplers.Cost) -> dict[str, float]:
    """Images and network rows of the run so far; a backward is not a row of its own."""
    return {
        "total/images": cost.images,
        "total/sampling_calls": cost.sampling_calls,
        "total/training_calls": cost.training_forwards,
    }


def _scorers(config: Config, world: World) -> evaluation.Scorers | None:
    if config.eval is None:
        return None
    judge = _judge(config.eval.judge, world) if config.eval.judge else None
    if judge is not None and not hasattr(judge, "features"):
        raise UserError(
            f"got eval.judge {config.eval.judge!r}, which has no image features; expected a CLIP-type scorer such as "
            "tiny-clip; name another, or null"
        )
    return evaluation.Scorers(load_reward(config.eval.rewards, device=world.device), judge)  # type: ignore[arg-type]


def _judge(spec: str | dict[str, Any], world: World) -> Reward:
    """The scorer itself, not a weighted sum of one: its image features are needed too."""
    if isinstance(spec, str):
        return load_reward(spec, device=world.device)
    if len(spec) != 1:
        raise UserError(f"got eval.judge with {len(spec)} scorers; expected one, such as {{clip: {{path: FOLDER}}}}")
    ((name, options),) = spec.items()
    options = options if isinstance(options, dict) else {}
    return load_reward(name, device=world.device, **{key: v for key, v in options.items() if key != "weight"})


def _measure(
    result: RewardResult, advantages: Advantages, images: Tensor, prompts: list[Prompt], groups: Tensor,
    judge: evaluation.Judge | None, floor: float | None, world: World,
) -> dict[str, float]:  # fmt: skip
    """Means over all images of all processes of the rewards, the judge and the image statistics, and what the
    advantages are worth."""
    columns = {"reward/mean": result.values} | {f"reward/{name}/mean": part for name, part in result.parts.items()}
    squares = [name for name in columns]
    columns |= {f"{name}^2": columns[name].double().square() for name in squares}
    if judge is not None:
        texts = [prompt.text for prompt in prompts]
        scored = checked_score(judge, images, texts, None, groups, all_missing="allow")
        columns[f"judge/{judge.spec.name}"] = scored.values
        columns["images/diversity"] = in_group_diversity(judge.features(images), groups)
    columns |= {f"images/{name}": stat for name, stat in image_statistics(images).items()}
    data = [column.detach().double().cpu() for column in columns.values()]
    sums = torch.stack([torch.stack([x.nansum(), (~x.isnan()).double().sum()]) for x in data])
    total, count = world.sum(sums).unbind(1)
    found = dict(zip(columns, (total / count).tolist(), strict=True))
    for name in squares:
        std = max(0.0, found.pop(f"{name}^2") - found[name] ** 2) ** 0.5
        found[name.removesuffix("mean") + "std"] = std
    counts = {
        "missing": advantages.missing,
        "dropped_groups": advantages.dropped_groups,
        "zero_variance_groups": advantages.zero_variance_groups,
        "clipped_advantages": advantages.clipped,
        "dominated": advantages.dominated,
    }
    totals = world.sum(torch.tensor(list(counts.values())).double()).tolist()
    about = dict(zip(counts, totals, strict=True))
    about |= illusory(result.values, advantages.advantages, groups, floor, world.sum)
    return found | {f"advantage/{name}": value for name, value in about.items()}
