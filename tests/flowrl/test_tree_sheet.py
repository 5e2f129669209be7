"""The picture of a tree: its images are the rollout's, its numbers stand at their own edges, the report shows it."""

import math
import re

import numpy as np
import pytest
import torch
from fake_run import CONFIG
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import find_objects
from tiny_pipelines import tiny_sd3

import samplers
from flowrl import tree_sheet
from flowrl.credit import Credit, leaf_mean, sibling
from flowrl.policies import GaussianPolicy
from flowrl.policies.pipeline import PipelinePolicy
from flowrl.report import write_report
from flowrl.sheets import PAPER
from flowrl.tree_sheet import arrange, draw, grow, outline, picture
from flowrl.update import RootConditioning
from reward_models.protocol import to_8bit
from samplers import PlanBuilder, plans, recipes

SIGMAS = [1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0]
PLANS = {
    "window": plans.sliding_tree(SIGMAS, (1, 3), 2, "cps", 0.8),
    "wide": plans.tree(SIGMAS, {0: 4, 2: 4, 3: 4}, "flow", noisy=range(5), trained=[2, 3]),
    "fork": recipes.fork(SIGMAS, 4, 3, "ddim"),
    "trunk": recipes.trunk(SIGMAS, [0, 2, 3], 2, "flow", finish_trunk=True),
    "grids": recipes.trunk(SIGMAS, [0, 1], 2, "flow", strides=(1, 2)),
    "tail": recipes.coarse_tail(plans.sliding_tree(SIGMAS, (0, 2), 3, "precise"), 0.5),
    "straight": plans.straight(SIGMAS, "flow"),
}


def rolled(policy, plan, roots, prompt, shared=False, guidance=1.0):
    """(tree, conditioning, initial keys) of a rollout as the trainer makes it."""
    keys = [samplers.Key(0, "rollout", 3, 7, 0, root) for root in range(roots)]
    init = [key._replace(root=None) for key in keys] if shared else keys
    cond = RootConditioning(policy.encode([prompt]), torch.zeros(roots, dtype=torch.long))
    with torch.no_grad():
        tree = samplers.rollout(
            lambda x, s, index: policy.predict(x, s, cond[index], guidance), plan, keys,
            latent_shape=policy.latent_shape(), init_keys=init, prior_std=policy.prior_std(plan.s[0]),
        )  # fmt: skip
    return tree, cond, init


# ---- the tree is the rollout's


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_what_grows_is_the_rollouts_tree(name, shared):
    policy, plan = GaussianPolicy(), PLANS[name]
    tree, cond, init = rolled(policy, plan, 3, "mean 0.5 -1", shared, guidance=1.5)
    for root in range(3):
        grown = grow(
            policy, plan, tree.keys[root], cond[torch.tensor([root])], 1.5, latent_shape=policy.latent_shape(),
            init_key=init[root], chunk=3,
        )  # fmt: skip
        assert torch.equal(grown.latents[list(plan.leaves)], tree.leaves[root])
        images = to_8bit(policy.decode(tree.leaves[root]))
        assert all(torch.equal(grown.images[leaf], images[i]) for i, leaf in enumerate(plan.leaves))
        # inside the tree: what the model makes of the states that training keeps
        kept = (tree.states.root == root).nonzero().flatten()
        x, s = tree.states.x[kept], tree.states.s[kept]
        x0_hat = x - s.view(-1, 1, 1, 1) * policy.predict(x, s, cond[tree.states.root[kept]], 1.5)
        assert len(kept) and torch.equal(grown.latents[tree.states.node[kept]], x0_hat)


def test_a_pipeline_grows_the_same_bits_in_the_same_padded_shape(tmp_path):
    policy = PipelinePolicy(tiny_sd3(tmp_path))
    plan = plans.sliding_tree(policy.sigmas(4), (1, 3), 2, "cps", 0.8)
    tree, cond, _ = rolled(policy, plan, 2, "a red circle", guidance=2.0)  # at most 8 rows: every call has 8
    one = cond[torch.tensor([1])]
    grown = grow(policy, plan, tree.keys[1], one, 2.0, latent_shape=policy.latent_shape(), nodes=[0, *plan.leaves])
    assert torch.equal(grown.latents[list(plan.leaves)], tree.leaves[1])
    assert set(grown.images) == {0, *plan.leaves}
    images = to_8bit(policy.decode(tree.leaves[1]))
    assert all(torch.equal(grown.images[leaf], image.detach()) for leaf, image in zip(plan.leaves, images, strict=True))


# ---- what is drawn where


def hand_made():
    """Two ODE steps; a fork in two, one child untrained; behind the trained one two equal noisy steps and the end."""
    builder = PlanBuilder(1.0)
    a = builder.add(builder.add(0, 0.9), 0.8)  # 1, 2
    left = builder.add(a, 0.6, "flow", 0.7, trained=True)  # 3
    right = builder.add(a, 0.6, "flow", 0.5)  # 4
    more = builder.add(left, 0.4, "flow", 0.7, trained=True)  # 5
    builder.add(builder.add(more, 0.2), 0.0)  # 6, 7
    builder.add(right, 0.0)  # 8
    return builder.build()


def test_lines_by_hand():
    plan = hand_made()
    c = plan.coefficients.c.tolist()
    numbers = [0.0, 9.0, 9.0, 0.25, 9.0, 0.25, 9.0, 9.0, 9.0], [1.0] * 9
    lines = {line.end: line for line in outline(plan, *numbers)}
    assert {end: (line.start, line.nodes, line.credit) for end, line in lines.items()} == {
        2: (0, (1, 2), None),  # without noise, so the 9 is no credit
        3: (2, (3,), 0.25),
        4: (2, (4,), None),  # noise that is not trained
        5: (3, (5,), 0.25),
        7: (5, (6, 7), None),
        8: (4, (8,), None),
    }
    assert lines[2].std == (0.0, 0.0) and lines[2].level == (0.0, 0.0) and not lines[2].noisy
    assert lines[3].std == (c[3],) and lines[4].level == (0.5,) and lines[4].noisy
    joined = {line.end: line for line in outline(plan, *numbers, joined=True)}
    assert joined[5] == (2, (3, 5), (c[3], c[5]), (0.7, 0.7), 0.25) and 3 not in joined
    numbers[0][5] = 0.5  # another credit keeps them apart
    assert 3 in {line.end for line in outline(plan, *numbers, joined=True)}
    numbers[1][3] = 0.0  # weight 0: out of the loss
    assert {line.end: line.credit for line in outline(plan, *numbers)} | {3: None, 5: 0.5} == {
        line.end: line.credit for line in outline(plan, *numbers)
    }


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("rule", ["leaf_mean", "sibling"])
@pytest.mark.parametrize("name", PLANS)
def test_credit_stands_at_its_own_edges(name, rule, joined):
    plan = PLANS[name]
    leaves = torch.randn(1, len(plan.leaves), generator=torch.Generator().manual_seed(len(name)))
    leaves[0, 0] = math.nan  # a missing reward: what leads to it alone is not in the loss
    made = leaf_mean(leaves, plan) if rule == "leaf_mean" else sibling(leaves, plan, torch.zeros(1, dtype=torch.long))
    lines = outline(plan, made.advantages[0].tolist(), made.weights[0].tolist(), joined)
    drawn = {node: line for line in lines for node in line.nodes}
    assert len(drawn) == sum(len(line.nodes) for line in lines) == len(plan) - 1  # every edge once
    for node, line in drawn.items():
        in_loss = plan.trained[node] and made.weights[0, node] > 0
        assert line.credit == (made.advantages[0, node].item() if in_loss else None)
        at = line.nodes.index(node)
        assert plan.parent[node] == (line.nodes[at - 1] if at else line.start)
        assert line.std[at] == plan.coefficients.c[node] and line.noisy == (line.std[at] > 0)
        assert line.level[at] == plan.level[node]
    assert {line.start for line in lines} - {0} <= {line.end for line in lines}
    noisy_ends = {node for node, line in drawn.items() if line.noisy} - {line.end for line in lines}
    assert joined or not noisy_ends  # each noisy step has an image at its end


@given(
    splits=st.dictionaries(st.integers(0, 4), st.integers(1, 3), max_size=3),
    noisy=st.sets(st.integers(0, 4)),
    joined=st.booleans(),
)
def test_nothing_lies_on_anything_else(splits, noisy, joined):
    plan = plans.tree(SIGMAS, splits, "flow", noisy=noisy | set(splits), trained=[])
    lines = outline(plan, [0.0] * len(plan), [1.0] * len(plan), joined)
    layout = arrange(plan, lines)
    assert sorted(layout.row[leaf] for leaf in plan.leaves) == list(range(len(plan.leaves)))
    assert all(plan.s_next[node] == layout.times[column] for node, column in layout.column.items())
    assert all(layout.column[line.start] < layout.column[line.end] for line in lines)
    assert len({(layout.column[node], layout.row[node]) for node in layout.column}) == len(layout.column)
    for node in layout.column:  # the rows of a subtree are its own
        inside = {layout.row[leaf] for leaf, below in zip(plan.leaves, plan.below[node].tolist(), strict=True) if below}
        assert max(inside) - min(inside) == len(inside) - 1 and min(inside) <= layout.row[node] <= max(inside)


@pytest.mark.parametrize("leaves", [2, 9, 64])
def test_the_page_holds_all_images_and_cuts_no_text(leaves):
    plan = plans.tree([1.0, 0.6, 0.3, 0.0], {1: leaves}, "flow")
    lines = outline(plan, [-1e-4 * n for n in range(len(plan))], [1.0] * len(plan))
    images = {n: torch.full((3, 8, 8), (n + 1) / 255) for n in range(len(plan))}  # a grey of its own for each node
    rewards = dict.fromkeys(plan.leaves, -1234.5) | {plan.leaves[0]: math.nan}
    page = draw(plan, lines, images, rewards, title="<b>many words</b> & more " * 30 + "x" * 400, notes=["note " * 90])
    pixels = np.asarray(page)
    paper = np.array([int(PAPER[i : i + 2], 16) for i in (1, 3, 5)])
    for edge in (pixels[:, -10:], pixels[:, :10], pixels[-10:], pixels[:10]):
        assert (edge == paper).all()
    grey = np.where((pixels == pixels[:, :, :1]).all(-1), pixels[:, :, 0], 0)
    found, layout = find_objects(grey), arrange(plan, lines)
    side = {2: 192, 9: 128, 64: 64}[leaves]
    boxes = {node: found[node] for node in layout.column}
    assert all(b - a == side for box in boxes.values() for a, b in ((x.start, x.stop) for x in box))
    for axis, order in ((0, layout.row), (1, layout.column)):
        assert sorted(boxes, key=lambda n: (boxes[n][axis].start, n)) == sorted(boxes, key=lambda n: (order[n], n))


# ---- for the trainer, and in the report


def test_the_trainers_call(tmp_path):
    policy, plan = GaussianPolicy(), PLANS["window"]
    tree, cond, init = rolled(policy, plan, 2, "mean 0.5 -1", shared=True)
    images = to_8bit(policy.decode(tree.leaves.flatten(0, 1)))
    values = torch.arange(8.0)
    credit = leaf_mean(values.view(2, 4) - 3.5, plan)

    def made(update, plan_tree=tree, prompt="mean 0.5 -1", init_keys=init):
        numbers = images, values, credit if plan_tree is tree else None
        return picture(tmp_path, update, policy, plan_tree, cond, 1.0, *numbers, prompt, init_keys=init_keys)

    path = made(20, prompt='<b>mean</b> & "0.5"')
    assert path == tmp_path / "samples" / "trees" / "update_000020.png"
    with Image.open(path) as page:
        assert page.info["prompt"] == '<b>mean</b> & "0.5"' and page.width >= 1000
    first = path.read_bytes()
    assert made(20, prompt='<b>mean</b> & "0.5"').read_bytes() == first  # the same file again
    for other in (PLANS["straight"], plans.tree(SIGMAS, {0: 65}, "flow")):
        assert made(22, rolled(policy, other, 2, "mean 0.5 -1")[0]) is None
    assert [file.name for file in path.parent.iterdir()] == ["update_000020.png"]


def test_the_pictured_numbers_are_those_of_the_first_root(tmp_path, monkeypatch):
    policy, plan = GaussianPolicy(), PLANS["window"]
    tree, cond, _ = rolled(policy, plan, 2, "mean 0.5 -1")
    images = to_8bit(policy.decode(tree.leaves.flatten(0, 1)))
    advantages = torch.arange(2.0 * len(plan)).view(2, -1)
    seen = {}

    def spy(plan, lines, images, rewards, **texts):
        seen.update(lines=lines, images=images, rewards=rewards, **texts)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(tree_sheet, "draw", spy)
    values = torch.tensor([0.1, 0.2, math.nan, 0.4, 5, 6, 7, 8], dtype=torch.float64)
    picture(tmp_path, 1, policy, tree, cond, 1.0, images, values, Credit(advantages, torch.ones(2, len(plan))), "p")
    assert {line.end: line.credit for line in seen["lines"] if line.noisy} == {n: float(n) for n in range(2, 8)}
    assert [seen["rewards"][leaf] for leaf in plan.leaves][:2] == [0.1, 0.2] and len(seen["rewards"]) == 4
    assert all(torch.equal(seen["images"][leaf], images[i]) for i, leaf in enumerate(plan.leaves))
    assert seen["title"] == "p" and len(seen["notes"]) == 1 and "4 images from 16 model calls (24 " in seen["notes"][0]
    policy.bias.data += 1.0  # called too late: the weights are others
    picture(tmp_path, 1, policy, tree, cond, 1.0, images, values, Credit(advantages, torch.ones(2, len(plan))), "p")
    assert re.search(r"[\d.]+% \(rms\) away from the run's", seen["notes"][1])


def test_many_times_join_the_steps_between_forks(tmp_path, monkeypatch):
    policy = GaussianPolicy()
    plan = plans.tree(torch.linspace(1, 0, 21).tolist(), {0: 2, 8: 2}, "flow")
    tree, cond, _ = rolled(policy, plan, 1, "mean 0.5 -1")
    images = to_8bit(policy.decode(tree.leaves[0]))
    credit = leaf_mean(torch.tensor([[1.0, -1.0, 0.5, 0.0]]), plan)
    lines = []
    monkeypatch.setattr(
        tree_sheet, "draw", lambda plan, found, *_, **__: lines.extend(found) or Image.new("RGB", (4, 4))
    )
    picture(tmp_path, 1, policy, tree, cond, 1.0, images, torch.zeros(4), credit, "p")
    assert [len(line.nodes) for line in lines] == [8, 8, 11, 11, 11, 11, 1, 1, 1, 1]
    assert [line.credit for line in lines] == [0.0, 0.25, 1.0, -1.0, 0.5, 0.0, None, None, None, None]


def shown(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    found = html[html.index('id="tree"') : html.index('id="cost"')] if 'id="tree"' in html else None
    return html, found


def test_the_report_shows_the_first_and_the_last_tree(tmp_path):
    folder = tmp_path  # a run that wrote nothing yet is enough, and its report quickly made
    (folder / "config.yaml").write_text(CONFIG)
    html, section = shown(folder)
    assert section is None and "One tree" not in html  # no tree, no section
    policy, plan = GaussianPolicy(), PLANS["trunk"]
    tree, cond, _ = rolled(policy, plan, 1, "mean 0.5 -1")
    images = to_8bit(policy.decode(tree.leaves[0]))
    credit = leaf_mean(torch.randn(1, len(plan.leaves)), plan)
    for update in (1, 20, 40):
        prompt = f"<script>alert({update})</script> \u00e9"
        picture(folder, update, policy, tree, cond, 1.0, images, torch.rand(len(plan.leaves)), credit, prompt)
    last = folder / "samples" / "trees" / "update_000060.png"
    last.write_bytes(b"half a picture")
    html, section = shown(folder)
    assert "<script" not in html and 'href="#tree"' in html
    updates = re.findall(r"<h3>Update (\d+): &lt;script&gt;alert\((\d+)\)&lt;/script&gt; \u00e9</h3>", section)
    assert updates == [("1", "1"), ("40", "40")]
    assert section.count("data:image/png;base64,") == 2
    for update in (20, 40):
        (folder / "samples" / "trees" / f"update_{update:06d}.png").unlink()
    assert shown(folder)[1].count("<img") == 1  # first and last are one
