"""The training loop: prompts, plan, tree, images, rewards, advantages, objective, update.

`train` is the one loop of all online methods; a method is a choice of its parts (see the config). Everything random is
keyed by (seed, update, prompt, ...), so the state of a run is its weights, its optimizer and a few counters, and a
resumed run goes on bit for bit.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

import samplers
from flowrl import evaluate as evaluation
from flowrl.advantages import Advantages, group_advantages
from flowrl.config import Config
from flowrl.credit import leaf_mean
from flowrl.distributed import World
from flowrl.errors import GuardStop, UserError
from flowrl.guards import require_finite
from flowrl.objectives import MetricMeans, Objective, get_objective
from flowrl.policies import LoraSettings, Policy, load_policy
from flowrl.prompts import Prompt, Slot, load_prompts, prompt_batch, split
from flowrl.rewards import load_reward
from flowrl.run import Run, Stopped
from flowrl.state import State
from flowrl.update import Batch, RootConditioning, UpdateSettings, accumulate_gradients, check_on_policy, with_halving
from reward_models.image_stats import image_statistics, in_group_diversity
from reward_models.protocol import Reward, RewardError, RewardResult, checked_score, to_8bit

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
        reward = load_reward(config.reward, device=world.device)
        scorers = _scorers(config, world)
        objective = get_objective(
            config.objective.name, clip_range=config.objective.clip, kl_weight=config.objective.kl.weight
        )
        judge = scorers.judge if scorers is not None else None
        specs = [scorer.spec for scorer in (reward, judge) if scorer is not None]
        run = stack.enter_context(Run.open(config, world, resume=resume, rewards=specs))
        policy = policy or _load_policy(config, world, run)
        _check_sizes(config, policy)
        state = State.create(config, policy)
        run.load(state, policy)
        run.encode_once(policy, prompts)
        if state.update == 0:
            run.evaluate(policy, scorers, "before")
            run.evaluate(policy, scorers, "before_guided")
            run.samples(policy, 0)
            run.save(state, policy)
        checked = not config.self_check.enabled

        while state.update < config.updates:
            clock = time.perf_counter()
            run.begin(state, policy)
            try:
                # roll out: one plan for the update, K images for each of this process's prompts
                slots = prompt_batch(len(prompts), config.prompts_per_update, config.seed, state.update)
                mine = split(list(enumerate(slots)), world.rank, world.size)
                plan = make_plan(config, policy, state.update)
                roots = [(place, slot) for place, slot in mine for _ in range(config.group_size // len(plan.leaves))]
                with world.together(), torch.no_grad():
                    cond = _encode(policy, prompts, roots)
                    tree = _rollout(config, policy, plan, state.update, roots, cond, run)
                    leaves = tree.leaves.flatten(0, 1).split(run.chunk)
                    images = torch.cat([to_8bit(policy.decode(part)).cpu() for part in leaves])

                # score: images on the 8-bit grid, each group whole on this process
                chosen = [prompts[slot.prompt] for _, slot in roots for _ in plan.leaves]
                place = torch.tensor([place for place, _ in roots])
                groups = place.repeat_interleave(len(plan.leaves))
                where = f"update {state.update + 1}"
                require_finite({"the latents": tree.leaves, "the images": images}, where, world.max)
                result = _score(reward, images, chosen, groups, world)
                rollout_s = time.perf_counter() - clock

                # credit: from leaves to edges
                advantages = group_advantages(
                    result.values, groups, std=config.advantage.std, eps=config.advantage.eps,
                    clip=config.advantage.clip, reduce=world.sum,
                )  # fmt: skip
                per_root = (len(roots), len(plan.leaves))
                credit = leaf_mean(advantages.advantages.view(per_root), plan, advantages.valid.view(per_root))
                edges = (tree.edges.root, tree.edges.node)
                part = (place % config.optimizer.inner_updates)[tree.states.root]
                values = _measure(result, advantages, images, chosen, groups, judge, world)
                batch = Batch(tree, cond, credit.advantages[edges], credit.weights[edges], place, part)
                if not checked:
                    state.ratio_max_dev = max(state.ratio_max_dev or 0.0, _self_check(config, policy, batch, world))
                    checked = True

                # update: inner steps, each on its share of the prompts
                metrics, norms, used = MetricMeans(), [], 0
                rate = state.set_learning_rate(config)
                for inner in range(config.optimizer.epochs * config.optimizer.inner_updates):
                    inner %= config.optimizer.inner_updates
                    norm, rows = _inner_update(config, policy, batch, inner, objective, state, world, metrics, run)
                    norms += [] if norm is None else [norm]
                    used += rows
            except (*FAILURES, Stopped):
                run.save_last_good(state, policy)
                raise
            state.update += 1
            state.cost += _cost(tree.cost, used, policy.calls(config.rollout.guidance), world)

            # log, look, save
            values |= metrics.result(world.sum, world.max)
            values |= {"grad_norm": sum(norms) / len(norms) if norms else float("nan"), "lr": rate}
            alarms = state.alarms.add(state.update, values)
            if config.eval and config.eval.every and state.update % config.eval.every == 0:
                values |= run.evaluate_now(policy, scorers)
            if config.logging.samples_every and state.update % config.logging.samples_every == 0:
                run.samples(policy, state.update)
            seconds = time.perf_counter() - clock
            count = config.prompts_per_update * config.group_size
            timings = {"images_per_s": count / seconds, "rollout_s": rollout_s, "update_s": seconds - rollout_s}
            run.write(state.update, values, timings, alarms)
            signalled = run.signalled()
            due = bool(config.checkpoint.every) and state.update % config.checkpoint.every == 0
            stopping = bool(alarms) and config.alarms.stop
            if due or signalled or stopping or state.update == config.updates:
                run.save(state, policy)
            if stopping:
                raise GuardStop(f"alarms.stop is set, and {alarms[0]}")
            if signalled:
                raise run.stopped()

        run.evaluate(policy, scorers, "after")
        return run.finish(state, policy)


# ------------------------------------------------------------------------------------------------ parts of an update
def make_plan(config: Config, policy: Policy, update: int) -> samplers.Plan:
    """The straight plan of Flow-GRPO: noise on all steps but the last, or in one random window per update ("fast")."""
    r = config.rollout
    sigmas = policy.sigmas(r.steps, r.height, r.width)
    if r.window is None:
        return samplers.plans.straight(sigmas, r.kernel, r.level, trained=range(r.trained_steps))
    low, high = r.window_range or (0, r.steps)
    key = samplers.Key(config.seed, "window", update, "", 0, None)
    start = key.integer(low, high - r.window.size + 1)
    window = range(start, start + r.window.size)
    return samplers.plans.straight(sigmas, r.kernel, r.level, trained=window, noisy=window)


def _check_sizes(config: Config, policy: Policy) -> None:
    """UserError for image sizes that the policy cannot make: now, not after the first evaluation."""
    for section in (config.rollout, config.eval):
        if section is not None:
            policy.latent_shape(section.height, section.width)


def _load_policy(config: Config, world: World, run: Run) -> Policy:
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
        reference=p.reference and config.objective.kl.weight > 0,  # nothing else looks at it
    )


def _encode(policy: Policy, prompts: list[Prompt], roots: list[tuple[int, Slot]]) -> RootConditioning:
    """Conditioning of every root; each prompt is held once, however many images it has."""
    texts = list(dict.fromkeys(prompts[slot.prompt].text for _, slot in roots))
    row = {text: i for i, text in enumerate(texts)}
    return RootConditioning(policy.encode(texts), torch.tensor([row[prompts[slot.prompt].text] for _, slot in roots]))


def _rollout(
    config: Config, policy: Policy, plan: samplers.Plan, update: int, roots: list[tuple[int, Slot]],
    cond: RootConditioning, run: Run,
) -> samplers.Tree:  # fmt: skip
    r, per_group = config.rollout, config.group_size // len(plan.leaves)
    keys = [
        samplers.Key(config.seed, "rollout", update, slot.prompt, slot.occurrence, k % per_group)
        for k, (_, slot) in enumerate(roots)
    ]
    init_keys = [key._replace(root=None) for key in keys] if r.shared_noise else keys

    def predict(x: Tensor, s: Tensor, index: Tensor) -> Tensor:
        return policy.predict(x, s, cond[index], r.guidance)

    def sample(chunk: int) -> samplers.Tree:
        return samplers.rollout(
            predict, plan, keys, latent_shape=policy.latent_shape(r.height, r.width), chunk=chunk,
            device=policy.device, density=samplers.Density(r.kernel, r.reduction, r.density), init_keys=init_keys,
            prior_std=policy.prior_std, on_chunk=lambda *_: run.check(),
        )  # fmt: skip

    tree, run.chunk = with_halving(sample, run.chunk, "the rollout", run.note)
    return tree


def _score(reward: Reward, images: Tensor, prompts: list[Prompt], groups: Tensor, world: World) -> RewardResult:
    """The reward of all images; a failure on one process ends the run on all, also when no image anywhere has one."""
    texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
    with world.together():
        result = checked_score(reward, images, texts, metadata, groups, all_missing="allow")
    if not world.any(not bool(result.missing.all())):
        raise RewardError(
            f"reward {reward.spec.name!r} gave NaN for all images of an update, expected at least one score. First "
            f"reason: {result.reasons[0]}. Check that the reward fits these prompts and their metadata."
        )
    return result


def _update_guidance(config: Config) -> float:
    return config.rollout.guidance if config.objective.guidance is None else config.objective.guidance


def _self_check(config: Config, policy: Policy, batch: Batch, world: World) -> float:
    """Largest |ratio - 1| over all processes before the first optimizer step; GuardStop outside the bound."""
    check, exact = config.self_check, config.policy.dtype == "float32"
    low = min(config.objective.clip) if check.bound_low_precision is None else check.bound_low_precision
    bound = 0.0 if exact and world.device.type == "cpu" else check.bound if exact else low
    network = getattr(policy, "network", None)
    with world.together():
        deviation = check_on_policy(
            policy, batch, _update_guidance(config), bound=bound, dtype=config.policy.dtype,
            modules=[] if network is None else [network],
        )  # fmt: skip
    return float(world.max(torch.tensor([deviation], dtype=torch.float64)))


def _inner_update(
    config: Config, policy: Policy, batch: Batch, part: int, objective: Objective, state: State, world: World,
    metrics: MetricMeans, run: Run,
) -> tuple[float | None, int]:  # fmt: skip
    """Gradients of one share of the prompts and one optimizer step: (gradient norm or None, states used)."""
    in_part = batch.part[batch.tree.edges.state] == part
    normaliser = float(world.sum(batch.weight[in_part].double().sum().reshape(1)))

    def gradients(micro_batch: int) -> tuple[MetricMeans, int]:
        state.optimizer.zero_grad(set_to_none=True)
        return accumulate_gradients(
            policy, batch, part, objective, normaliser or 1.0,
            UpdateSettings(_update_guidance(config), micro_batch, config.objective.kl.form),
            scale=state.scaler.scale, on_chunk=lambda _: run.check(),
        )  # fmt: skip

    with world.together():
        (found, used), run.micro_batch = with_halving(gradients, run.micro_batch, "the update", run.note)
    metrics.merge(found)
    parameters = [parameter for _, parameter in policy.trainable()]
    world.sum_gradients(parameters)
    norm = state.step(config, policy, parameters, world, loss=found.loss)
    run.committed = True  # from here on this update is finished before a signal is heard
    return norm, used


def _cost(sampled: samplers.Cost, states: int, calls: int, world: World) -> samplers.Cost:
    """What an update really cost on all processes: `states` training forwards, `calls` network rows each."""
    local = torch.tensor([sampled.sampling_calls * calls, states * calls, sampled.images]).double()
    sampling, training, images = (int(x) for x in world.sum(local).tolist())
    return samplers.Cost(sampling, training, training, images)


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
    judge: evaluation.Judge | None, world: World,
) -> dict[str, float]:  # fmt: skip
    """Means over all images of all processes of the rewards, the judge and the image statistics."""
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
    }
    totals = world.sum(torch.tensor(list(counts.values())).double()).tolist()
    return found | {f"advantage/{name}": total for name, total in zip(counts, totals, strict=True)}
