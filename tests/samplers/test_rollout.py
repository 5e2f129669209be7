"""The rollout engine: what it samples, what it keeps, what it costs, and which bits it promises."""

import math
import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from samplers import Cost, Density, Key, rollout
from samplers.plans import PlanBuilder, sliding_tree, straight, tree

SHAPE = (3, 4, 4)
SIGMAS = samplers.sd3_sigmas(6)
TREES = {
    "straight": straight(SIGMAS),
    "window": straight(SIGMAS, "cps", noisy=[1, 2]),
    "binary": sliding_tree(SIGMAS, (1, 4)),
    "branches": tree(SIGMAS, {0: 2, 3: 3}, "precise"),
    "noise to the end": straight(SIGMAS, "dance", last_step_noise=True, trained=range(6)),
}


def keys(n, prompt=0):
    return [Key(5, "test", 0, prompt, 0, root) for root in range(n)]


def network(seed=0):
    """A small velocity network with weights; every call is padded to 64 rows, as one matrix product of one shape."""
    g = torch.Generator().manual_seed(seed)
    d = math.prod(SHAPE)
    w1 = (torch.randn(d + 2, 32, generator=g) / math.sqrt(d)).requires_grad_()
    w2 = (torch.randn(32, d, generator=g) / math.sqrt(32)).requires_grad_()

    def predict(x, s, index):
        rows = torch.cat([x.flatten(1), s.unsqueeze(1), index.unsqueeze(1) / 10], 1)
        padded = torch.cat([rows, rows[-1:].expand(64 - len(rows), -1)])
        return (torch.tanh(padded @ w1) @ w2)[: len(x)].view(x.shape)

    return predict, (w1, w2)


def sample(plan, n=5, chunk=7, **kwargs):
    return rollout(network()[0], plan, keys(n), latent_shape=SHAPE, chunk=chunk, **kwargs)


@pytest.mark.parametrize("plan", TREES.values(), ids=TREES)
def test_shapes_and_costs(plan):
    calls = []
    predict, _ = network()

    def counted(x, s, index):
        calls.append(len(x))
        assert s.dtype == x.dtype == torch.float32 and index.dtype == torch.long and not torch.is_grad_enabled()
        return predict(x, s, index)

    out = rollout(counted, plan, keys(5), latent_shape=SHAPE, chunk=7)
    assert out.leaves.shape == (5, len(plan.leaves), *SHAPE) and out.leaf_nodes.tolist() == list(plan.leaves)
    assert out.leaves.isfinite().all() and not out.leaves.requires_grad
    assert sum(calls) == out.cost.sampling_calls == 5 * plan.cost().sampling_calls and max(calls) <= 7
    assert list(out.calls) == calls
    assert len(out.states) == out.cost.training_forwards and len(out.edges) == 5 * sum(plan.trained)
    assert out.states.x.shape == (len(out.states), *SHAPE) and out.edges.x_next.shape == (len(out.edges), *SHAPE)
    assert out.density == Density(plan.trained_kernel)


@pytest.mark.parametrize("plan", TREES.values(), ids=TREES)
def test_edges_are_the_steps_that_were_taken(plan):
    """Recomputed in float64 from plan, states and keys: x_next = a x + b v + c noise, and its log-prob."""
    out, predict = sample(plan), network()[0]
    assert torch.equal(out.edges.state, out.edges.state.sort().values)
    for e in range(0, len(out.edges), 3):
        state, node, root = (int(t[e]) for t in (out.edges.state, out.edges.node, out.edges.root))
        assert int(out.states.node[state]) == plan.parent[node] and int(out.states.root[state]) == root
        x, s = out.states.x[[state]], out.states.s[[state]]
        assert s.item() == pytest.approx(plan.s[node]) and plan.s[node] == float(out.edges.s[e])
        v = predict(x, s, torch.tensor([root])).double()
        kernel = samplers.get_kernel(plan.kernel[node])
        a, b, c = kernel.coefficients(plan.s[node], plan.s_next[node], plan.level[node])
        key = keys(5)[root]._replace(path=plan.paths[node], step=plan.depths[node] - 1)
        mean = a * x + b * v
        x_next = out.edges.x_next[[e]].double()
        torch.testing.assert_close(x_next, mean + c * samplers.noise([key], SHAPE), rtol=0, atol=1e-5)
        density = torch.distributions.Normal(mean, c).log_prob(x_next).mean()
        assert float(out.edges.log_prob[e]) == pytest.approx(density.item(), abs=1e-4)
        assert float(out.edges.d[e]) == plan.s[node] - plan.s_next[node]


@pytest.mark.parametrize("plan", TREES.values(), ids=TREES)
def test_ratio_is_exactly_one_on_replay(plan):
    out, predict = sample(plan), network()[0]
    seen = []
    for call in out.replay_chunks():
        assert len(call.x) == len(call.s) == len(call.index) <= 7
        v = predict(call.x, call.s, call.index)[call.rows]
        edges, _, log_prob = out.log_prob(v, call.states)
        assert torch.equal((log_prob - out.edges.log_prob[edges]).exp(), torch.ones(len(edges)))
        seen += edges.tolist()
    assert sorted(seen) == list(range(len(out.edges)))


@settings(max_examples=15)
@given(st.data())
def test_ratio_is_exactly_one_for_any_micro_batch(data):
    """Also for other cuts and orders than the rollout's, as long as the network's matrix products keep their shape."""
    plan = TREES[data.draw(st.sampled_from(sorted(TREES)))]
    out, predict = sample(plan), network()[0]
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(out.states) - 1), min_size=1, max_size=9, unique=True)))
    v = predict(out.states.x[rows], out.states.s[rows], out.states.root[rows])
    edges, position, log_prob = out.log_prob(v, rows)
    assert torch.equal(out.edges.state[edges], rows[position])
    assert torch.equal(log_prob, out.edges.log_prob[edges])
    assert len(edges) == int(torch.isin(out.edges.state, rows).sum())


def test_edges_of_hand_written_tree():
    """Two roots, one branching into three: states 0, 1 have three edges each."""
    builder = PlanBuilder()
    for _ in range(3):
        builder.add(builder.add(0, 0.5, "flow", 0.7, trained=True), 0.0)
    out = rollout(network()[0], builder.build(), keys(2), latent_shape=SHAPE)
    assert out.edges.state.tolist() == [0, 0, 0, 1, 1, 1] and out.edges.node.tolist() == [1, 3, 5] * 2
    edges, position = out.edges_of(torch.tensor([1, 0]))
    assert edges.tolist() == [3, 4, 5, 0, 1, 2] and position.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(out.plan.below[out.edges.node[edges[:3]]], torch.eye(3, dtype=torch.bool))
    assert out.edges.weight.tolist() == pytest.approx([1 / 3] * 6)


@pytest.mark.parametrize("plan", TREES.values(), ids=TREES)
def test_chunk_size_changes_no_bit(plan):
    reference = sample(plan, chunk=64)
    for chunk in (1, 3, 8):
        out = sample(plan, chunk=chunk)
        assert torch.equal(out.leaves, reference.leaves)
        assert torch.equal(out.edges.log_prob, reference.edges.log_prob)
        assert torch.equal(out.states.x[:], reference.states.x[:])


def test_row_order_and_company_change_no_bit():
    """Each root's images depend on its key alone: reversed, or alone, they are the same."""

    def own_noise_only(x, s, index):  # the network's index input is the row, not the key: leave it out
        return network()[0](x, s, torch.zeros_like(index))

    plan = TREES["branches"]
    together = rollout(own_noise_only, plan, keys(5), latent_shape=SHAPE)
    backwards = rollout(own_noise_only, plan, keys(5)[::-1], latent_shape=SHAPE)
    assert torch.equal(backwards.leaves.flip(0), together.leaves)
    alone = rollout(own_noise_only, plan, [keys(5)[3]], latent_shape=SHAPE)
    assert torch.equal(alone.leaves[0], together.leaves[3])


@pytest.mark.parametrize("name", ["binary", "branches"])
def test_one_image_of_a_tree_replayed_alone(name):
    plan = TREES[name]
    whole = sample(plan, n=2)
    for at, leaf in enumerate(plan.leaves):
        alone = sample(plan.branch(leaf), n=2)
        assert torch.equal(alone.leaves[:, 0], whole.leaves[:, at])


def test_all_leaves_differ():
    leaves = sample(TREES["branches"]).leaves.flatten(0, 1).flatten(1)
    assert bool((torch.cdist(leaves, leaves) + torch.eye(len(leaves)) > 1e-3).all())


def test_noise_free_rollout_is_the_diffusers_sampler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    predict, _ = network()
    x = samplers.noise(keys(5), SHAPE)
    out = sample(straight(SIGMAS, level=0.0), chunk=64)
    index = torch.arange(5)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(predict(x, scheduler.sigmas[i].expand(5), index), t, x).prev_sample
    assert torch.equal(out.leaves[:, 0], x)
    assert len(out.states) == len(out.edges) == 0 and list(out.replay_chunks()) == []


@pytest.mark.parametrize("kernel", [name for name in samplers.kernel_names() if name != "ode2"])
def test_sample_variance_follows_the_linear_gaussian_recursion(kernel):
    """Optimal velocity of data N(0, 0.5^2): the exact variance of every state, against 4 * 10^4 samples."""
    level = samplers.get_kernel(kernel).default_level
    data_var, plan = 0.25, straight(SIGMAS, kernel, level, trained=[], last_step_noise=True)

    def slope(s):
        return (s - (1 - s) * data_var) / ((1 - s) ** 2 * data_var + s**2)

    measured = []

    def measure(depth, nodes, x):
        measured.append(float(x.double().square().mean()))

    out = rollout(
        lambda x, s, i: slope(s).view(-1, 1, 1, 1) * x,
        plan,
        keys(40),
        latent_shape=(10, 10, 10),
        on_frontier=measure,
    )
    measure(None, None, out.leaves)
    variance = [1.0]
    for s, s_next in zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True):
        a, b, c = (float(t) for t in samplers.get_kernel(kernel).coefficients(s, s_next, level))
        variance.append((a + b * slope(s)) ** 2 * variance[-1] + c * c)
    for got, expected in zip(measured, variance, strict=True):
        assert abs(got / expected - 1) < 5 * math.sqrt(2 / out.leaves.numel())


def loss_terms(out, e, log_prob, advantage):
    return (log_prob - out.edges.log_prob[e]).exp() * advantage[e]


@pytest.mark.parametrize("name", ["binary", "branches"])
def test_shared_parent_forward_has_the_gradient_of_one_forward_per_edge(name):
    out = sample(TREES[name])
    predict, weights = network()
    advantage = torch.randn(len(out.edges), generator=torch.Generator().manual_seed(1))

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    shared = torch.zeros(())
    for rows in torch.arange(len(out.states)).split(8):
        v = predict(out.states.x[rows], out.states.s[rows], out.states.root[rows])
        e, _, log_prob = out.log_prob(v, rows)
        shared = shared + loss_terms(out, e, log_prob, advantage).sum()
    per_edge = torch.zeros(())
    for e in torch.arange(len(out.edges)).split(8):
        state = out.edges.state[e]
        x = out.states.x[state]
        v = predict(x, out.states.s[state], out.states.root[state])
        mean = samplers.affine(x, v, out.edges.a[e], out.edges.b[e])
        log_prob = samplers.log_prob(out.edges.x_next[e], mean, out.edges.c[e])
        per_edge = per_edge + loss_terms(out, e, log_prob, advantage).sum()
    one, other = gradient(shared), gradient(per_edge)
    assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("name", ["binary", "branches"])
def test_share_weights_make_a_tree_the_mean_of_its_paths(name):
    """sum_edges share x f(edge) = mean_leaves sum_path f, for f linear in what lies below (leaf-mean credit)."""
    out = sample(TREES[name])
    f = torch.randn(len(out.edges), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    by_share = (out.edges.weight * f).sum()
    mask = out.plan.below[out.edges.node]
    by_path = torch.zeros((), dtype=torch.float64)
    for root in range(5):
        for leaf in range(len(out.plan.leaves)):
            by_path += f[(out.edges.root == root) & mask[:, leaf]].sum() / len(out.plan.leaves)
    torch.testing.assert_close(by_share, by_path)
    for root in range(5):  # at each depth the weights of a root sum to 1
        for s in out.edges.s.unique():
            assert float(out.edges.weight[(out.edges.root == root) & (out.edges.s == s)].sum()) == pytest.approx(1)


def test_only_latents_that_training_needs_are_kept():
    """An ODE prefix and suffix leave nothing behind, and a latent that ends one step and starts the next lies once."""
    two_of_six = sample(TREES["window"])
    assert two_of_six.states.x.pool.shape[0] == 5 * 3  # states before, between and after the two steps
    assert sample(TREES["straight"]).states.x.pool.shape[0] == 5 * 6  # five trained steps
    assert sample(TREES["straight"], keep=False).states.x.pool.shape[0] == 0
    assert two_of_six.states.x.pool.data_ptr() == two_of_six.edges.x_next.pool.data_ptr()


def test_prefix_is_freed_while_sampling():
    """When a step is predicted, all earlier frontiers and velocities are gone."""
    earlier = []

    def watching(x, s, index):
        assert not any(tensor() is not None for tensor in earlier)
        v = torch.zeros_like(x)
        assert x._base is not None  # a view of what the engine holds
        earlier.extend([weakref.ref(x._base), weakref.ref(v)])
        return v

    rollout(watching, straight(samplers.sd3_sigmas(8), noisy=[1, 4]), keys(4), latent_shape=SHAPE)
    assert len(earlier) == 16


def test_keep_false_samples_the_same_images():
    plan = TREES["binary"]
    bare = sample(plan, keep=False)
    assert torch.equal(bare.leaves, sample(plan).leaves)
    assert len(bare.states) == len(bare.edges) == 0 and bare.cost == Cost(5 * (1 + 1 + 2 + 4 + 8 + 8), 0, 0, 5 * 8)


def test_shared_initial_noise():
    plan = straight(SIGMAS)
    shared = [key._replace(root=None) for key in keys(5)]
    seen = []
    sample(plan, init_keys=shared, on_frontier=lambda depth, nodes, x: seen.append(x.clone()))
    assert bool((seen[0] == seen[0][:, :1]).all()) and not bool((seen[1] == seen[1][:, :1]).all())
    assert torch.equal(seen[0][0, :1], samplers.noise(shared[:1], SHAPE))


def test_given_initial_latents_and_prior_std():
    plan = straight(SIGMAS, level=0.0)
    x = samplers.noise(keys(5), SHAPE)
    assert torch.equal(sample(plan, x_init=2 * x).leaves, sample(plan, prior_std=2.0).leaves)


def test_callbacks():
    plan, fronts, chunks = TREES["binary"], [], []
    sample(
        plan,
        on_chunk=lambda call, rows: chunks.append((call, rows)),
        on_frontier=lambda depth, nodes, x: fronts.append((depth, nodes, tuple(x.shape))),
    )
    assert [c for c, _ in chunks] == list(range(len(chunks))) and sum(rows for _, rows in chunks) == 5 * 24
    assert fronts == [(d, f.parents, (len(f.parents), 5, *SHAPE)) for d, f in enumerate(plan.frontiers)]


def test_mixed_frontier():
    """Trunk, trained branches and untrained tails of other lengths share a frontier; the replay still is exact."""
    builder = PlanBuilder()
    for path in ([0.75, 0.5, 0.25, 0.0], [0.75, 0.25, 0.0]):
        node = builder.add(0, path[0], "flow", 0.7, trained=True)
        for i, s in enumerate(path[1:]):
            node = builder.add(node, s, "flow", 0.7 if i == 0 else 0.0, trained=i == 0 and len(path) == 4)
    trunk = builder.add(0, 0.75)
    builder.add(trunk, 0.0)
    out, predict = sample(builder.build(), chunk=4), network()[0]
    assert len(out.states) == 10 and len(out.edges) == 15
    for call in out.replay_chunks():
        v = predict(call.x, call.s, call.index)[call.rows]
        edges, _, log_prob = out.log_prob(v, call.states)
        assert torch.equal(log_prob, out.edges.log_prob[edges])
        assert len(call.x) == out.calls[int(out.states.call[call.states[0]])]


def test_bad_input():
    plan, predict = straight(SIGMAS), network()[0]
    cases = [
        (dict(keys=[]), "got 0 keys"),
        (dict(keys=[keys(1)[0]] * 2), "equal keys"),
        (dict(chunk=0), "chunk 0; expected at least 1"),
        (dict(x_init=torch.zeros(2, 1, 1, 1)), r"x_init is \(2, 1, 1, 1\); expected \(3, 3, 4, 4\)"),
        (dict(init_keys=keys(1)), "1 init_keys for 3 keys"),
        (dict(density=Density("cps")), "kernel 'cps'; expected 'flow'"),
        (dict(predict=lambda x, s, i: x[:1]), "predict gave"),
    ]
    for change, message in cases:
        arguments = dict(predict=predict, plan=plan, keys=keys(3), latent_shape=SHAPE) | change
        with pytest.raises(ValueError, match=message):
            rollout(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("solver", ["ode", "ode2"])
def test_cuda_samples_what_the_cpu_samples(solver):
    def predict(x, s, index):
        return torch.tanh(x) * s.view(-1, 1, 1, 1)

    plan = sliding_tree(SIGMAS, (1, 4), solver=solver)
    cpu = rollout(predict, plan, keys(5), latent_shape=SHAPE)
    gpu = rollout(predict, plan, keys(5), latent_shape=SHAPE, device="cuda")
    torch.testing.assert_close(gpu.leaves.cpu(), cpu.leaves, rtol=0, atol=1e-5)
    torch.testing.assert_close(gpu.edges.log_prob.cpu(), cpu.edges.log_prob, rtol=0, atol=1e-4)
    for call in gpu.replay_chunks():
        edges, _, log_prob = gpu.log_prob(predict(call.x, call.s, call.index)[call.rows], call.states)
        torch.testing.assert_close(log_prob, gpu.edges.log_prob[edges.cuda()], rtol=0, atol=1e-5)
