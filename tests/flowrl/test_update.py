"""One update: its gradient against an independent autograd computation, its shortcuts, and the on-policy self-check."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import gaussian_reference as reference
import pytest
import torch
from tiny_pipelines import tiny_sd3

import samplers
from flowrl.credit import leaf_mean
from flowrl.errors import GuardStop
from flowrl.layer_tuning import LayerTuning, Supervised, progress_targets
from flowrl.objectives import DPPO, Clipped, EdgeScalars, Guard, LossTerms, SoftmaxTB
from flowrl.policies import GaussianPolicy, PipelinePolicy
from flowrl.update import (
    Batch,
    UpdateSettings,
    accumulate_gradients,
    active_states,
    check_on_policy,
    edge_scalars,
    forwards_per_row,
    on_policy_deviation,
    total_weight,
    with_halving,
)

PROMPTS = ["mean 0.5 -1", "mean -1 0.3", "mean 1.5 1"]
SIGMAS = torch.linspace(1, 0, 6, dtype=torch.float64)
PLANS = {
    "straight": samplers.plans.straight(SIGMAS),
    "two steps": samplers.plans.straight(SIGMAS, trained=[1, 2]),
    "binary tree": samplers.plans.sliding_tree(SIGMAS, (1, 4)),
    "uneven tree": samplers.plans.tree(SIGMAS, {0: 3, 2: 2}),
}
CLIP = 0.03


def weights(policy: GaussianPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    return policy.weight.detach().double().clone(), policy.bias.detach().double().clone()


def move(policy: GaussianPolicy, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@dataclass
class Case:
    """A rollout of a policy that then moved on, with random leaf advantages: some exactly 0, some missing (NaN)."""

    policy: GaussianPolicy
    old: tuple[torch.Tensor, torch.Tensor]
    batch: Batch
    leaves: torch.Tensor  # (R, L) advantages
    means: torch.Tensor

    def gradient(self, **settings) -> torch.Tensor:
        """By autograd through the formulas, float64."""
        trained = tuple(w.requires_grad_() for w in weights(self.policy))
        value = reference.loss(trained, self.old, self.batch.tree, self.means, self.leaves, clip=CLIP, **settings)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, trained)])

    def mine(self, objective, micro_batch: int = 64, kl_form: str = "exact", part: int = 0):
        """By `accumulate_gradients`: (gradient, metrics, states used)."""
        inside = self.batch.part[self.batch.tree.edges.state] == part
        normaliser = float(self.batch.weight[inside].double().sum())
        for _, parameter in self.policy.trainable():
            parameter.grad = None
        settings = UpdateSettings(1.0, micro_batch, kl_form)
        metrics, used = accumulate_gradients(self.policy, self.batch, part, objective, normaliser, settings)
        grads = [p.grad for _, p in self.policy.trainable() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads]).double() if grads else None, metrics, used


def case(plan: samplers.Plan, *, seed: int = 0, roots_per_prompt: int = 2, moved: float = 0.15, parts: int = 1) -> Case:
    policy = GaussianPolicy(std=reference.STD)
    move(policy, seed + 1, 0.3)  # away from the reference
    old = weights(policy)
    order = torch.arange(len(PROMPTS)).repeat_interleave(roots_per_prompt)
    cond = policy.encode(PROMPTS)[order]
    keys = [samplers.Key(seed, "test", 0, int(p), 0, i) for i, p in enumerate(order)]

    def predict(x, s, index):
        return policy.predict(x, s, cond[index])

    tree = samplers.rollout(predict, plan, keys, latent_shape=(2, 1, 1), chunk=5)
    generator = torch.Generator().manual_seed(seed + 2)
    leaves = torch.randn(len(keys), len(plan.leaves), generator=generator)
    leaves[order == 1] = 0.0  # a group of equal rewards
    leaves[0, 0] = math.nan
    valid = ~leaves.isnan()
    credit = leaf_mean(leaves.nan_to_num(), plan, valid)
    edges = (tree.edges.root, tree.edges.node)
    part = (order % parts)[tree.states.root]
    progress = progress_targets(LayerTuning(weight=0.7, states="all", floor=None), tree, leaves, order)
    batch = Batch(tree, cond, credit.advantages[edges], credit.weights[edges], order, part, leaves, progress=progress)
    policy.copy_weights("current", "old")
    move(policy, seed + 3, moved)
    return Case(policy, old, batch, leaves, cond.rows["mean"])


def close(mine: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("kl_weight", "kl_form"), [(0.0, "exact"), (0.4, "exact"), (0.4, "published")])
def test_gradient_is_that_of_the_loss(name, kl_weight, kl_form):
    made = case(PLANS[name])
    expected = made.gradient(kl_weight=kl_weight, kl_form=kl_form)
    objective = Clipped(CLIP, kl_weight)
    for micro_batch in (1, 5, 64):
        mine, metrics, _ = made.mine(objective, micro_batch, kl_form)
        close(mine, expected)
    # the case has what it is for: clipped edges on both sides
    assert 0 < metrics.result()["clip_active"] < 1
    if kl_weight:
        other = "published" if kl_form == "exact" else "exact"
        assert (made.gradient(kl_weight=kl_weight, kl_form=other) - expected).abs().max() > 0.01 * expected.abs().max()


def test_logged_loss_is_the_loss_that_was_differentiated():
    made = case(PLANS["uneven tree"])
    for kl_weight in (0.0, 0.4):  # without the KL, rows of advantage 0 are left out of the forward but not of the mean
        _, metrics, _ = made.mine(Clipped(CLIP, kl_weight))
        trained = weights(made.policy)
        expected = reference.loss(
            trained, made.old, made.batch.tree, made.means, made.leaves, clip=CLIP, kl_weight=kl_weight
        )
        assert metrics.result()["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["straight", "binary tree"])
def test_rows_without_advantage_cost_nothing_and_change_nothing(name, monkeypatch):
    made = case(PLANS[name])
    short, _, used = made.mine(Clipped(CLIP))
    states = made.batch.tree.states
    nothing = states.root[active_states(made.batch, 0, Clipped(CLIP))]
    assert not {2, 3} & set(nothing.tolist())  # the roots of the prompt whose rewards are equal
    assert used < len(states)
    monkeypatch.setattr("flowrl.update.active_states", lambda batch, part, objective: torch.arange(len(states)))
    full, _, used = made.mine(Clipped(CLIP))
    assert used == len(states)
    torch.testing.assert_close(short, full, rtol=1e-6, atol=1e-9)


def test_the_kl_needs_rows_without_advantage():
    made = case(PLANS["straight"])
    _, _, used = made.mine(Clipped(CLIP, 0.4))
    # all but those of the trajectory whose reward is missing: KL counts where the advantage is 0, not where it is NaN
    assert used == len(made.batch.tree.states) - len([s for s in made.batch.tree.states.root if s == 0])


def test_inner_updates_share_the_edges():
    whole, parts = case(PLANS["binary tree"]), case(PLANS["binary tree"], parts=2)
    objective = Clipped(CLIP, 0.4)
    total, weight, used = 0.0, 0.0, 0
    for part in (0, 1):
        gradient, metrics, states = parts.mine(objective, 5, part=part)
        roots = [root for root, prompt in enumerate(parts.batch.group.tolist()) if prompt % 2 == part]
        close(gradient, parts.gradient(kl_weight=0.4, roots=roots))
        total, weight, used = total + gradient * metrics.weight, weight + metrics.weight, used + states
    close(total / weight, whole.mine(objective)[0])
    assert used == whole.mine(objective)[2]


@dataclass(frozen=True)
class TwoPass:
    """Another objective's formula, declared as coupled: all scalars first, then their gradients through the model."""

    inner: Clipped
    name = "two-pass"
    coupled = True

    @property
    def needs(self):
        return self.inner.needs

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        return self.inner(edges)


@dataclass(frozen=True)
class GroupSquare:
    """A loss that no edge can compute alone: sum over groups of (sum over its edges of w A (log p - log p_old))^2."""

    name = "group-square"
    coupled = True
    needs = frozenset({"edges"})

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        each = edges.weight * edges.advantage * (edges.log_prob - edges.old_log_prob)
        same = (edges.group[:, None] == edges.group[None, :]).to(each)
        return LossTerms(each * (same @ each), {})


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_two_passes_give_the_gradient_of_one(micro_batch):
    made = case(PLANS["uneven tree"])
    for objective in (Clipped(CLIP), Clipped(CLIP, 0.4)):
        one, first, _ = made.mine(objective, micro_batch)
        two, second, _ = made.mine(TwoPass(objective), micro_batch)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-8)
        assert first.result()["loss"] == pytest.approx(second.result()["loss"], rel=1e-5)
    assert first.result() == pytest.approx(second.result(), rel=1e-4, abs=1e-7)  # with the KL both use all rows


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_a_coupled_loss_does_not_depend_on_the_micro_batch(micro_batch):
    made = case(PLANS["uneven tree"])
    mine, _, _ = made.mine(GroupSquare(), micro_batch)
    # by autograd through everything at once
    tree, policy = made.batch.tree, made.policy
    v = policy.predict(tree.states.x[:], tree.states.s, made.batch.cond[tree.states.root])
    edges, _, log_prob = tree.log_prob(v, slice(None))
    assert edges.tolist() == list(range(len(tree.edges)))
    each = made.batch.weight * made.batch.advantage * (log_prob - tree.edges.log_prob)
    groups = made.batch.group[tree.edges.root]
    loss = sum(each[groups == g].sum() ** 2 for g in groups.unique()) / made.batch.weight.sum()
    grads = torch.autograd.grad(loss, [p for _, p in policy.trainable()])
    close(mine, torch.cat([g.flatten() for g in grads]).double())


# ------------------------------------------------------------------------------- the other objectives on edges
EVERY = {
    "clipped": Clipped(CLIP, 0.4),
    "adaptive": Clipped(CLIP, clip_range_max=0.2, sensitivity=2.0),
    "guard": Guard(0.02),
    "guard, KL": Guard(0.02, 0.4, reweight="step"),
    "dppo": DPPO(1e-3),
    "tmpo": SoftmaxTB(2.0, clip_range=0.3),
    "tmpo, squared": SoftmaxTB(2.0, "squared", kl_weight=0.4),
    "supervised": Supervised(Clipped(CLIP)),
    "supervised tmpo": Supervised(SoftmaxTB(2.0, "squared")),
}


def edge_by_edge(made: Case, trained) -> list[dict]:
    """The numbers of every edge that has a valid leaf below, in float64 from the formulas of the Gaussian flow."""
    tree, plan, found = made.batch.tree, made.batch.tree.plan, []
    zero = (torch.zeros_like(made.old[0]), torch.zeros_like(made.old[1]))
    for e in range(len(tree.edges)):
        root, node = int(tree.edges.root[e]), int(tree.edges.node[e])
        below = [n for n, leaf in enumerate(plan.leaves) if node in reference.ancestors(plan, leaf)]
        valid = [n for n in below if not made.leaves[root, n].isnan()]
        if not valid:
            continue
        s, s_next = plan.s[node], plan.s_next[node]
        a, b, c = reference.flow_step(s, s_next, plan.level[node])
        x = tree.states.x[tree.edges.state[[e]]].flatten().double()
        x_next, mean = tree.edges.x_next[[e]].flatten().double(), made.means[root].double()
        v, v_old, v_ref = (reference.velocity(x, s, mean, w) for w in (trained, made.old, zero))
        log_prob, old = (torch.distributions.Normal(a * x + b * u, c).log_prob(x_next).mean() for u in (v, v_old))
        best = int(made.batch.progress.best[root])
        gap = None if best < 0 else ((v - (x - tree.leaves[root, best].flatten().double()) / s) ** 2).mean()
        found.append({
            "root": root, "group": int(made.batch.group[root]), "leaves": valid, "log_ratio": log_prob - old.detach(),
            "log_prob": log_prob, "shift": (b * (v - v_old)).square().mean(), "b": b, "c": c, "d": s - s_next,
            "kl": (b * (v - v_ref)).square().mean() / (2 * c**2), "weight": len(valid) / len(plan.leaves), "gap": gap,
            "advantage": sum(made.leaves[root, n].item() for n in valid) / len(valid),
            "imitates": float(made.batch.progress.weight[e]),
        })  # fmt: skip
    return found


def written_out(made: Case, name: str, trained) -> torch.Tensor:
    """The loss of one of the objectives above, straight from its formula."""
    edges = edge_by_edge(made, trained)
    total = torch.zeros((), dtype=torch.float64)
    for e in edges:
        r, a, w = e["log_ratio"].exp(), e["advantage"], e["weight"]

        def clip(r, low, high, a=a):
            return torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))

        if name in ("clipped", "supervised"):
            total = total + w * clip(r, CLIP, CLIP)
        if name == "adaptive":
            bound = CLIP + (0.2 - CLIP) / (1 + math.exp(-2 * a))
            total = total + w * clip(r, bound, bound)
        if name.startswith("guard"):
            normed = ((e["log_ratio"] + e["shift"] / (2 * e["c"] ** 2)) * e["c"]).exp()
            total = total + w * clip(normed, 0.02, 0.02) / (e["d"] if "KL" in name else abs(e["b"]))
        if name == "dppo":
            held = e["shift"] / (2 * e["c"] ** 2) >= 1e-3 and a * (r.item() - 1) > 0
            total = total + (0 if held else -w * a * r)
        if name in ("clipped", "guard, KL", "tmpo, squared"):
            total = total + 0.4 * w * e["kl"]
        if name.startswith("supervised") and e["gap"] is not None:
            total = total + e["imitates"] * e["gap"]
    if "tmpo" in name:
        for group in {e["group"] for e in edges}:
            paths = {}
            for e in edges:
                for leaf in e["leaves"] if e["group"] == group else []:
                    paths.setdefault((e["root"], leaf), []).append(e)
            q = torch.stack([sum(e["log_prob"] for e in path) for path in paths.values()]).log_softmax(0)
            values = torch.tensor([made.leaves[path].item() for path in paths], dtype=torch.float64)
            t = (2 * values).log_softmax(0)
            changes = [sum(e["log_ratio"] for e in path) for path in paths.values()]
            centre = sum(change.item() for change in changes) / len(changes)
            for i, path in enumerate(paths.values()):
                term = (q[i] - t[i]) ** 2
                if name == "tmpo":
                    normed = [(e["log_ratio"] + e["shift"] / (2 * e["c"] ** 2)) * e["c"] for e in path]
                    w = min(max(math.exp(sum(normed).item() / len(path)), 0.7), 1.3)
                    a, r = (t[i] - q[i]).item(), (changes[i] - centre).exp()
                    term = w * torch.maximum(-a * r, -a * r.clamp(0.7, 1.3))
                # an edge's weight times the mean over its paths: each path counts 1 / leaves on each of its edges
                total = total + term * len(path) / made.leaves.shape[1]
    return total / sum(e["weight"] for e in edges)


@pytest.mark.parametrize("plan", ["straight", "uneven tree"])
@pytest.mark.parametrize("name", EVERY)
def test_every_objective_has_the_gradient_of_its_loss(name, plan):
    made = case(PLANS[plan])
    trained = tuple(w.requires_grad_() for w in weights(made.policy))
    loss = written_out(made, name, trained)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
    assert expected.abs().max() > 0
    for micro_batch in (1, 7, 64):
        mine, metrics, _ = made.mine(EVERY[name], micro_batch)
        close(mine, expected)
    assert metrics.result()["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert total_weight(made.batch, 0, EVERY[name]) == pytest.approx(made.batch.weight.sum().item())


@pytest.mark.parametrize("name", ["guard", "dppo", "tmpo"])
def test_on_policy_the_old_weights_need_no_forward_of_their_own(name, monkeypatch):
    made = case(PLANS["uneven tree"], moved=0.0)
    expected, first, used = made.mine(EVERY[name])
    settings = UpdateSettings(1.0, 64, on_policy=True)
    rows, predict = [], made.policy.predict
    monkeypatch.setattr(made.policy, "predict", lambda *args: rows.append(len(args[0])) or predict(*args))
    for _, parameter in made.policy.trainable():
        parameter.grad = None
    metrics, _ = accumulate_gradients(made.policy, made.batch, 0, EVERY[name], made.batch.weight.sum().item(), settings)
    mine = torch.cat([p.grad.flatten() for _, p in made.policy.trainable()]).double()
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
    assert metrics.result() == pytest.approx(first.result(), rel=1e-5, abs=1e-7)
    passes = 2 if EVERY[name].coupled else 1
    assert sum(rows) == passes * used * forwards_per_row(EVERY[name], settings) == passes * used
    rows.clear()
    made.mine(EVERY[name])
    assert sum(rows) == passes * used * forwards_per_row(EVERY[name], UpdateSettings(1.0, 64)) == 2 * passes * used


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("density", ["gaussian", "unscaled"])
def test_the_shift_of_the_mean_fits_the_density(reduction, density):
    """Guard's ratio is that of the noise, <eps (m - m_old)>, under each reduction and density."""
    made = case(PLANS["straight"])
    tree = made.batch.tree
    other = samplers.Density("flow", reduction, density)
    with torch.no_grad():
        x, s, cond = tree.states.x[:], tree.states.s, made.batch.cond[tree.states.root]
        with made.policy.weights("old"):
            _, _, old = tree.mean(made.policy.predict(x, s, cond), slice(None))
        _, _, now = tree.mean(made.policy.predict(x, s, cond), slice(None))
        c = tree.edges.c.float()[:, None]
        eps = (tree.edges.x_next[:] - old).flatten(1) / c
        expected = eps * (now - old).flatten(1)
        log_prob = other.log_prob(tree.edges.x_next[:], old, tree.edges.c)
        tree = replace(tree, density=other, edges=replace(tree.edges, log_prob=log_prob))
        batch = Batch(**{**vars(made.batch), "tree": tree})
        rows = torch.arange(len(tree.states))
        scalars = edge_scalars(made.policy, batch, rows, Guard(), UpdateSettings(1.0, 64))
    log_ratio = Guard((0.9, 1e9))(scalars).metrics["ratio"].log()
    expected = expected.sum(1) if reduction == "sum" else expected.mean(1)
    torch.testing.assert_close(log_ratio, expected, rtol=2e-3, atol=2e-5)


def test_paths_are_the_values_below_edges_that_are_in_the_loss():
    made = case(PLANS["uneven tree"])
    tree, weight = made.batch.tree, made.batch.weight.clone()
    weight[::3] = 0.0  # pruned, though the leaves below have values
    batch = Batch(**{**vars(made.batch), "weight": weight})
    paths = edge_scalars(made.policy, batch, torch.arange(len(tree.states)), SoftmaxTB(), UpdateSettings(1.0, 64)).paths
    for e in range(len(tree.edges)):
        below = [int(tree.edges.node[e]) in reference.ancestors(tree.plan, leaf) for leaf in tree.plan.leaves]
        root = int(tree.edges.root[e])
        expected = [made.leaves[root, n].item() if b and weight[e] > 0 else math.nan for n, b in enumerate(below)]
        assert paths[e].tolist() == pytest.approx(expected, nan_ok=True)


def test_what_an_objective_needs_must_be_there():
    made = case(PLANS["straight"])
    for name, objective in {"leaf_advantage": SoftmaxTB(), "progress": Supervised(Clipped())}.items():
        batch = Batch(**{**vars(made.batch), name: None})
        with pytest.raises(ValueError, match=rf"Batch\.{name}"):
            accumulate_gradients(made.policy, batch, 0, objective, 1.0, UpdateSettings(1.0, 8))


def test_states_that_imitate_are_used_though_their_advantage_is_zero():
    made = case(PLANS["binary tree"])
    batch = Batch(**{**vars(made.batch), "advantage": torch.zeros_like(made.batch.advantage)})
    assert len(active_states(batch, 0, Clipped())) == 0
    used = active_states(batch, 0, Supervised(Clipped()))
    imitating = made.batch.tree.edges.state[(made.batch.progress.weight > 0) & (made.batch.weight > 0)].unique()
    assert used.tolist() == imitating.tolist() and len(used) > 0


@pytest.mark.parametrize("name", EVERY)
def test_an_update_without_any_edge_names_the_same_metrics(name):
    made = case(PLANS["straight"])
    names = set(made.mine(EVERY[name])[1].result())
    empty = Batch(**{**vars(made.batch), "weight": torch.zeros_like(made.batch.weight)})
    metrics, used = accumulate_gradients(made.policy, empty, 0, EVERY[name], 1.0, UpdateSettings(1.0, 8))
    assert used == 0 and set(metrics.result()) == names and metrics.result()["edges"] == 0


# ---------------------------------------------------------------------------------------------------- a real network
@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sd3(tmp_path_factory.mktemp("tokenizers"))


def network_case(pipeline, plan, *, chunk: int, guidance: float = 1.0):
    """(policy, batch) of a small SD3 with LoRA."""
    import copy

    policy = PipelinePolicy(copy.deepcopy(pipeline))
    cond = policy.encode(["a red circle", "two dogs"])[torch.tensor([0, 0, 0, 1, 1])]
    keys = [samplers.Key(0, "test", 0, i // 3, 0, i) for i in range(5)]

    def predict(x, s, index):
        return policy.predict(x, s, cond[index], guidance)

    tree = samplers.rollout(predict, plan, keys, latent_shape=policy.latent_shape(), chunk=chunk)
    advantage = torch.randn(len(tree.edges), generator=torch.Generator().manual_seed(0))
    group = torch.tensor([0, 0, 0, 1, 1])
    part = torch.zeros(len(tree.states), dtype=torch.long)
    return policy, Batch(tree, cond, advantage, tree.edges.weight, group, part)


SHORT = samplers.plans.straight(samplers.sd3_sigmas(4))


def test_gradient_through_a_network_is_that_of_one_big_batch(pipeline):
    policy, batch = network_case(pipeline, samplers.plans.sliding_tree(samplers.sd3_sigmas(4), (0, 2)), chunk=4)
    parameters = [p for _, p in policy.trainable()]
    gradients = {}
    for micro_batch in (3, 64):
        policy.network.zero_grad()
        accumulate_gradients(policy, batch, 0, Clipped(0.1, 0.2), 4.0, UpdateSettings(1.0, micro_batch))
        gradients[micro_batch] = torch.cat([p.grad.flatten() for p in parameters])
    tree = batch.tree
    v = policy.predict(tree.states.x[:], tree.states.s, batch.cond[tree.states.root])
    edges, at, log_prob = tree.log_prob(v, slice(None))
    ratio = (log_prob - tree.edges.log_prob).exp()
    worse = torch.maximum(-batch.advantage * ratio, -batch.advantage * ratio.clamp(0.9, 1.1))
    with torch.no_grad(), policy.weights("reference"):
        v_ref = policy.predict(tree.states.x[:], tree.states.s, batch.cond[tree.states.root])
    kl = (tree.edges.b / tree.edges.c) ** 2 / 2 * (v[at] - v_ref[at]).square().flatten(1).mean(1)
    loss = (tree.edges.weight * (worse + 0.2 * kl)).sum() / 4.0
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    assert expected.abs().max() > 0
    for mine in gradients.values():
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("chunk", [2, 5, 64])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_ratio_is_exactly_one_before_the_first_step(pipeline, chunk, guidance):
    policy, batch = network_case(pipeline, SHORT, chunk=chunk, guidance=guidance)
    assert on_policy_deviation(policy, batch, guidance) == 0.0
    checked = check_on_policy(policy, batch, guidance, bound=0.0, dtype="float32", modules=[policy.network])
    assert checked == 0.0


def test_self_check_names_another_guidance(pipeline):
    policy, batch = network_case(pipeline, SHORT, chunk=8)
    with pytest.raises(GuardStop, match=r"deviates from 1 by .* suspects: .*guidance"):
        check_on_policy(policy, batch, 3.0, bound=0.0, dtype="float32", modules=[policy.network])


def test_self_check_names_dropout(pipeline):
    policy, batch = network_case(pipeline, SHORT, chunk=8)
    policy.network.add_module("drop", torch.nn.Dropout(0.3).train())
    hook = policy.network.proj_out.register_forward_hook(lambda module, given, out: policy.network.drop(out))
    with pytest.raises(GuardStop) as stopped:
        check_on_policy(policy, batch, 1.0, bound=0.0, dtype="float32", modules=[policy.network])
    assert "training mode (dropout?)" in str(stopped.value) and "two equal calls differ" in str(stopped.value)
    hook.remove()
    policy.network.drop.eval()
    assert check_on_policy(policy, batch, 1.0, bound=0.0, dtype="float32", modules=[policy.network]) == 0.0


def test_self_check_names_low_precision_and_geometry():
    made = case(PLANS["straight"], moved=0.05)
    with pytest.raises(GuardStop, match="the network computes in bfloat16"):
        check_on_policy(made.policy, made.batch, 1.0, bound=0.0, dtype="bfloat16", modules=[])
    with pytest.raises(GuardStop, match="geometry"):
        check_on_policy(made.policy, made.batch, 1.0, bound=0.0, dtype="float32", modules=[])
    assert check_on_policy(made.policy, made.batch, 1.0, bound=10.0, dtype="bfloat16", modules=[]) > 0


# -------------------------------------------------------------------------------------------------- out of memory
def test_halving_until_it_fits():
    said, tried = [], []

    def run(size: int) -> str:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("no room")
        return f"done with {size}"

    assert with_halving(run, 24, "the update", said.append) == ("done with 3", 3)
    assert tried == [24, 12, 6, 3]
    assert said[-1] == "out of memory: the update goes on with 3 rows per model call" and len(said) == 3


def test_halving_ends_at_one_row():
    def run(size: int) -> None:
        raise torch.OutOfMemoryError("no room at all")

    with pytest.raises(torch.OutOfMemoryError, match="no room at all"):
        with_halving(run, 4, "the update", lambda text: None)
