"""One tree of a rollout as a picture: its images from noise to data, and the noise and credit of every step.

Noise is on the left, finished images with their rewards are on the right. An image inside the tree is the model's
prediction there, x0_hat = x_s - s v, decoded. A line is one denoising step; steps without noise that follow each other
share a line, and so do equal steps between two forks where a tree has very many times. The trained steps carry their
credit as a number and as colour; the width of a line is the std c of its noise.

`picture` is what the trainer calls; `grow`, `outline`, `arrange` and `draw` are its four parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import samplers
from flowrl.sheets import GAP, INK, MARGIN, PAPER, SOFT, Picture, font, visible, wrapped
from reward_models.protocol import to_8bit
from samplers.kernels import per_row

if TYPE_CHECKING:
    from flowrl.credit import Credit
    from flowrl.policies import Conditioning, Policy
    from flowrl.update import RootConditioning

FOLDER = Path("samples") / "trees"
MAX_LEAVES = 64  # larger trees are not drawn
MAX_TIMES = 10  # a tree with images at more times than this is drawn with equal steps between forks joined
NOTED = 0.01  # rms distance of a tree sampled again from the run's, in units of its latents, that the picture tells

GOOD, BAD, NEUTRAL, FAINT = "#1667c7", "#bd2a2a", "#a9b2bc", "#c5ccd3"
THIN, THICK = 4, 15  # pixels of a line whose step has hardly any noise, and of the one with the most
BEND = 72  # pixels in which a line turns from its parent's row to its own
SMOOTH = 3  # lines are drawn this much larger and reduced
HEADING, BODY, SMALL = font(34), font(26), font(22)


# ---------------------------------------------------------------------------------------------------------- the tree
class Grown(NamedTuple):
    """latents: (N, C, h, w), x0_hat of inner nodes and the final latent of leaves. images: of the nodes asked for,
    (3, H, W) in [0, 1] on the 8-bit grid, on the CPU."""

    latents: Tensor
    images: dict[int, Tensor]


@torch.no_grad()
def grow(
    policy: Policy,
    plan: samplers.Plan,
    key: samplers.Key,
    cond_row: Conditioning,
    guidance: float,
    *,
    latent_shape: Sequence[int],
    init_key: samplers.Key | None = None,
    chunk: int = 64,
    nodes: Sequence[int] | None = None,
) -> Grown:
    """Sample the tree of one root again, keeping what the model predicts at every node.

    Args:
        key: the root's key in the rollout. init_key: that of its initial noise, where another one.
        cond_row: the one row of its prompt. guidance: that of the rollout. The policy must have the rollout's weights.
        latent_shape: (C, h, w). chunk: most rows per model call.
        nodes: those to decode; None: all.

    The numbers are the rollout's own: bit for bit where the model is called in the same padded shape, else to rounding.
    """
    predicted: list[Tensor] = []

    def predict(x: Tensor, s: Tensor, index: Tensor) -> Tensor:
        v = policy.predict(x, s, cond_row[index], guidance)
        predicted.append(x - per_row(s, x) * v.to(torch.float32))
        return v

    tree = samplers.rollout(
        predict, plan, [key], latent_shape=latent_shape, chunk=chunk, device=policy.device, keep=False,
        init_keys=[init_key or key], prior_std=policy.prior_std(plan.s[0]),
    )  # fmt: skip
    inner = [node for front in plan.frontiers for node in front.parents]  # the order of the model calls
    latents = torch.empty(len(plan), *latent_shape, device=tree.leaves.device)
    latents[inner], latents[list(plan.leaves)] = torch.cat(predicted), tree.leaves[0]
    wanted = list(range(len(plan)) if nodes is None else nodes)
    decoded = [to_8bit(policy.decode(latents[wanted[i : i + 8]])).cpu() for i in range(0, len(wanted), 8)]
    return Grown(latents, dict(zip(wanted, torch.cat(decoded), strict=True)))


# -------------------------------------------------------------------------------------------------------- its drawing
class Line(NamedTuple):
    """Steps drawn as one line from node `start` to node `end`: one, or a run that no image interrupts.

    nodes: those that the steps lead to, in order, `end` included. std, level: of each step's noise, 0 where there is
    none. credit: of each of the steps; None where they are not in the loss.
    """

    start: int
    nodes: tuple[int, ...]
    std: tuple[float, ...]
    level: tuple[float, ...]
    credit: float | None

    @property
    def end(self) -> int:
        return self.nodes[-1]

    @property
    def noisy(self) -> bool:
        return self.std[0] > 0


def outline(
    plan: samplers.Plan, advantages: Sequence[float], weights: Sequence[float], joined: bool = False
) -> list[Line]:
    """The lines of a tree, parents first. advantages, weights: of its N nodes, see `credit.Credit`.

    A node without an image, inside a line, has one child and no noise before and after it; with `joined` also noise of
    one kernel and equal credit.
    """
    c: list[float] = plan.coefficients.c.tolist()
    credit = [a if t and w > 0 else None for a, w, t in zip(advantages, weights, plan.trained, strict=True)]

    def inside(node: int) -> bool:
        if node == 0 or len(plan.children(node)) != 1:
            return False
        (child,) = plan.children(node)
        if c[node] == 0:
            return c[child] == 0
        return joined and c[child] > 0 and (plan.kernel[node], credit[node]) == (plan.kernel[child], credit[child])

    lines = []
    for end in range(1, len(plan)):
        if not inside(end):
            nodes = [end]
            while inside(plan.parent[nodes[0]]):
                nodes.insert(0, plan.parent[nodes[0]])
            std, level = tuple(c[node] for node in nodes), tuple(plan.level[node] * (c[node] > 0) for node in nodes)
            lines.append(Line(plan.parent[nodes[0]], tuple(nodes), std, level, credit[end]))
    return lines


class Layout(NamedTuple):
    """Where the nodes with images stand: one column per time, `times` from noise to data; rows counted in leaves."""

    times: tuple[float, ...]
    column: dict[int, int]
    row: dict[int, float]


def arrange(plan: samplers.Plan, lines: Sequence[Line]) -> Layout:
    """Leaves one below the other, siblings together, and every other node half-way between its outer children.

    So the rows of a subtree belong to it alone, and a line that turns right after its parent crosses no image.
    """
    shown = [0, *(line.end for line in lines)]
    times = sorted({plan.s_next[node] for node in shown}, reverse=True)
    in_order = sorted(plan.leaves, key=lambda leaf: plan.paths[leaf])
    row = {leaf: float(i) for i, leaf in enumerate(in_order)}
    below: dict[int, list[float]] = {}
    for line in reversed(lines):  # children before their parents
        if line.end not in row:
            row[line.end] = (min(below[line.end]) + max(below[line.end])) / 2
        below.setdefault(line.start, []).append(row[line.end])
    row[0] = (min(below[0]) + max(below[0])) / 2
    return Layout(tuple(times), {node: times.index(plan.s_next[node]) for node in shown}, row)


def draw(
    plan: samplers.Plan,
    lines: Sequence[Line],
    images: Mapping[int, Picture],
    rewards: Mapping[int, float],
    *,
    title: str = "",
    notes: Sequence[str] = (),
) -> Image.Image:
    """The picture. lines: of `outline`. images: of the root and of every node at the end of a line. rewards: of the
    leaves, NaN = missing. title: the prompt.

    It is made for twice the pixel density of a web page: text is 11 to 17 px high when it is shown at half its size.
    """
    layout = arrange(plan, lines)
    side = 192 if len(plan.leaves) <= 8 else 128 if len(plan.leaves) <= 32 else 64
    shown = {node: visible(images[node], side, side) for node in layout.column}
    width, height = (max(image.size[axis] for image in shown.values()) for axis in (0, 1))
    pitch = max(height + 2 * GAP, 80)  # a line has a text above and one below it

    largest = max((abs(line.credit) for line in lines if line.credit is not None), default=0.0)
    texts = {line.end: _texts(plan, line, _digits(largest)) for line in lines}
    inks = {"+": GOOD, "-": BAD}
    turn = {line.end: BEND if len(plan.children(line.start)) > 1 else 0 for line in lines}
    left = [MARGIN]
    for column in range(len(layout.times) - 1):
        starting = [line.end for line in lines if layout.column[line.start] == column]
        room = max(turn[end] + max(BODY.getlength(texts[end][0]), SMALL.getlength(texts[end][1])) for end in starting)
        left.append(left[-1] + width + math.ceil(room) + 2 * GAP)
    digits = _digits(max((abs(r) for r in rewards.values() if math.isfinite(r)), default=0.0))
    scores = {leaf: f"{r:.{digits}f}" if math.isfinite(r) else "missing" for leaf, r in rewards.items()}
    beside = max(BODY.getlength(text) for text in ("reward", *scores.values()))
    total = max(math.ceil(left[-1] + width + 2 * GAP + beside + MARGIN), 1000)

    heads = [(text, HEADING, INK, 44) for text in wrapped(title, HEADING, total - 2 * MARGIN)]
    heads += [(text, SMALL, SOFT, 30) for note in notes for text in wrapped(note, SMALL, total - 2 * MARGIN)]
    legend, under = _legend(total, MARGIN + sum(head[3] for head in heads) + GAP)
    top = under + 44  # of the first row, below the times
    page = Image.new("RGB", (total, math.ceil(top + pitch * len(plan.leaves) + MARGIN)), PAPER)
    pen = ImageDraw.Draw(page)
    y = MARGIN
    for text, face, colour, step in heads:
        pen.text((MARGIN, y), text, font=face, fill=colour)
        y += step
    for points, look, text, at in legend:
        if points:
            _stroke(page, points, *look)
        pen.text(at, text, font=SMALL, fill=INK, anchor="lm")
    for x, s in zip(left, layout.times, strict=True):
        pen.text((x, under + 20), f"s {s:.3g}", font=SMALL, fill=SOFT, anchor="lm")
    pen.text((left[-1] + width + 2 * GAP, under + 20), "reward", font=SMALL, fill=SOFT, anchor="lm")

    most = max(std for line in lines for std in line.std)
    middle = {node: round(top + pitch * (row + 0.5)) for node, row in layout.row.items()}
    for line in sorted(lines, key=lambda line: abs(line.credit or 0)):  # strong ones over weak ones where they part
        look = _look(line, most, largest)
        start, end = left[layout.column[line.start]] + width, left[layout.column[line.end]]
        _stroke(page, _way(start, middle[line.start], end, middle[line.end]), *look)  # images will cover both ends
    for line in lines:
        above, below = texts[line.end]
        x = left[layout.column[line.start]] + width + turn[line.end] + GAP
        y, half = middle[line.end], _look(line, most, 1)[0] / 2
        pen.text((x, y - half - 4), above, font=BODY, fill=inks.get(above[:1], SOFT), anchor="ls")
        pen.text((x, y + half + 4), below, font=SMALL, fill=SOFT, anchor="lt")
    for node, image in shown.items():
        x, y = left[layout.column[node]] + (width - image.width) // 2, middle[node] - image.height // 2
        page.paste(image, (x, y))
        pen.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=SOFT)
    for leaf, text in scores.items():
        place = (left[-1] + width + 2 * GAP, middle[leaf])
        pen.text(place, text, font=BODY, fill=SOFT if text == "missing" else INK, anchor="lm")
    return page


# ---------------------------------------------------------------------------------------------------- for the trainer
def picture(
    folder: Path,
    update: int,
    policy: Policy,
    tree: samplers.Tree,
    cond: RootConditioning,
    guidance: float,
    images: Tensor,
    values: Tensor,
    credit: Credit,
    prompt: str,
    *,
    init_keys: Sequence[samplers.Key] | None = None,
    chunk: int = 64,
) -> Path | None:
    """Write the tree of the rollout's first root to `samples/trees/update_000020.png` and return its path.

    The finished images are the run's own; those inside the tree are sampled once more (one root's model calls), so
    call it before the weights change; the picture tells where they end elsewhere. Where the plan does not branch or
    has more than 64 leaves, nothing is drawn and None returned.

    Args:
        update: number of the update that the rollout belongs to. guidance, init_keys, chunk: those of the rollout.
        images: (R L, 3, H, W). values: (R L,) or (R, L) rewards, NaN = missing.
        credit: of the R roots. prompt: of the first one; it is also kept in the file, as text.
    """
    plan = tree.plan
    if not 1 < len(plan.leaves) <= MAX_LEAVES:
        return None
    numbers = credit.advantages[0].tolist(), credit.weights[0].tolist()
    lines = outline(plan, *numbers)
    if len(arrange(plan, lines).times) > MAX_TIMES:
        lines = outline(plan, *numbers, joined=True)
    inner = sorted({line.start for line in lines})
    grown = grow(
        policy, plan, tree.keys[0], cond[torch.tensor([0])], guidance, latent_shape=tree.leaves.shape[2:],
        init_key=None if init_keys is None else init_keys[0], chunk=chunk, nodes=inner,
    )  # fmt: skip
    own = tree.leaves[0].to(grown.latents)
    distance = float((grown.latents[list(plan.leaves)] - own).square().mean().sqrt() / own.square().mean().sqrt())
    alone = plan.independent_cost()
    kernels = sorted({plan.kernel[node] for line in lines if line.noisy for node in line.nodes})
    notes = [
        f"update {update}, one tree: {alone.images} images from {plan.cost().sampling_calls} model calls "
        f"({alone.sampling_calls} if each were drawn alone), noise of kernel {', '.join(kernels) or 'none'}"
    ]
    if not distance <= NOTED:
        notes.append(
            f"the images inside the tree were sampled again, with final latents {distance:.1%} (rms) away from the "
            "run's: they are not quite those that it passed through"
        )
    sheet = draw(
        plan,
        lines,
        grown.images | dict(zip(plan.leaves, images, strict=False)),
        dict(zip(plan.leaves, values.flatten().tolist(), strict=False)),
        title=prompt,
        notes=notes,
    )
    path = folder / FOLDER / f"update_{update:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = PngInfo()
    facts.add_itxt("prompt", prompt)
    sheet.save(path, pnginfo=facts)
    return path


# --------------------------------------------------------------------------------------------------------- how it looks
Look = tuple[float, str, bool]  # width, colour, dashed
Point = tuple[float, float]


def _look(line: Line, most: float, largest: float) -> Look:
    if not line.noisy:
        return 2, FAINT, False
    width = THIN + (THICK - THIN) * max(line.std) / most
    if line.credit is None:
        return width, NEUTRAL, True
    return width, _mixed(GOOD if line.credit > 0 else BAD, abs(line.credit) / largest if largest else 0.0), False


def _mixed(colour: str, share: float) -> str:
    """`share` of a colour and the rest neutral."""
    pairs = ((int(c[i : i + 2], 16) for c in (colour, NEUTRAL)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(share * strong + (1 - share) * weak):02x}" for strong, weak in pairs)


def _texts(plan: samplers.Plan, line: Line, digits: int) -> tuple[str, str]:
    """What stands above and below a line."""
    steps = f"{len(line.nodes)} steps" if len(line.nodes) > 1 else "1 step"
    if not line.noisy:
        return "", f"{steps}, {plan.kernel[line.end]}"
    credit = "" if line.credit is None else f"{line.credit:+.{digits}f}" if round(line.credit, digits) else "0"
    count = steps if len(line.nodes) > 1 else ""
    return ", ".join(filter(None, (credit, count))), f"c {_range(line.std, '.2g')}, h {_range(line.level, '.3g')}"


def _range(values: Sequence[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(limit, form) for limit in (min(values), max(values))))


def _digits(largest: float) -> int:
    """Digits after the point, 2 to 6, that show the largest of some numbers to three figures."""
    return min(max(2 - math.floor(math.log10(largest)), 2), 6) if largest else 2


def _way(x: float, y: float, end: float, row: float) -> list[Point]:
    """A curve that leaves (x, y) and meets row `row` horizontally, then a straight line to a little beyond `end`."""
    if y == row:
        return [(x - GAP, y), (end + GAP, y)]
    curve = [(x + t * BEND, y + (row - y) * t * t * (3 - 2 * t)) for t in (i / 24 for i in range(25))]
    return [(x - GAP, y), *curve, (end + GAP, row)]


def _stroke(page: Image.Image, points: Sequence[Point], width: float, colour: str, dashed: bool) -> None:
    """Draw a smooth line: larger, as a mask, through which the colour is laid on the page."""
    x0, y0 = (math.floor(min(p[axis] for p in points) - width) for axis in (0, 1))
    x1, y1 = (math.ceil(max(p[axis] for p in points) + width) for axis in (0, 1))
    mask = Image.new("L", ((x1 - x0) * SMOOTH, (y1 - y0) * SMOOTH))
    pen = ImageDraw.Draw(mask)
    for part in _dashes(points, 14, 10) if dashed else [points]:
        scaled = [((x - x0) * SMOOTH, (y - y0) * SMOOTH) for x, y in part]
        pen.line(scaled, fill=255, width=round(width * SMOOTH), joint="curve")
    mask = mask.resize((x1 - x0, y1 - y0), Image.Resampling.BOX)
    page.paste(colour, (x0, y0), mask)


def _dashes(points: Sequence[Point], on: float, off: float) -> list[list[Point]]:
    """A line cut into pieces of length `on` with gaps of `off` between them."""
    pieces: list[list[Point]] = [[points[0]]]
    drawing, left = True, on
    for (x, y), (to_x, to_y) in zip(points[:-1], points[1:], strict=True):
        length, done = math.hypot(to_x - x, to_y - y), 0.0
        while length - done > left:
            done += left
            here = (x + (to_x - x) * done / length, y + (to_y - y) * done / length)
            if drawing:
                pieces[-1].append(here)
            else:
                pieces.append([here])
            drawing = not drawing
            left = on if drawing else off
        left -= length - done
        if drawing:
            pieces[-1].append((to_x, to_y))
    return pieces


def _legend(width: int, top: float) -> tuple[list[tuple[list[Point], Look, str, Point]], float]:
    """What the signs mean, in rows that fit: (samples of lines with their texts and places), and where it ends."""
    solid = THIN + 4
    items: list[tuple[Look | None, str]] = [
        ((solid, GOOD, False), "credit above 0: made more likely"),
        ((solid, BAD, False), "below 0: less likely"),
        ((solid, NEUTRAL, False), "credit 0"),
        ((solid, NEUTRAL, True), "not in the loss"),
        ((2, FAINT, False), "no noise"),
        (None, "width and c: std of the step's noise, h: its level"),
        (None, "s: time, from 1 (noise) to 0 (image)"),
        (None, "images before s 0: what the model predicts there"),
    ]
    found: list[tuple[list[Point], Look, str, Point]] = []
    x, y, sample = float(MARGIN), top + 16, 56
    for look, text in items:
        room = SMALL.getlength(text) + (sample + GAP if look else 0)
        if x > MARGIN and x + room > width - MARGIN:
            x, y = float(MARGIN), y + 32
        line: list[Point] = [(x, y), (x + sample, y)] if look else []
        found.append((line, look or (0, PAPER, False), text, (x + (sample + GAP if look else 0), y)))
        x += room + 4 * GAP
    return found, y + 24
