"""samplers: kernels, schedules, plans and rollouts for flow and diffusion models. Needs torch only.

    sigmas = samplers.sd3_sigmas(10)
    plan = samplers.plans.straight(sigmas, kernel="flow", level=0.7)
    keys = [samplers.Key(seed=0, purpose="demo", update=0, prompt=0, occurrence=0, root=i) for i in range(16)]
    tree = samplers.rollout(predict, plan, keys, latent_shape=(16, 64, 64))     # predict(x, s, index) -> v
    tree.leaves, tree.states, tree.edges, tree.cost

Conventions: time s runs from 1 (noise) to 0 (data), x_s = (1 - s) x0 + s e, the model predicts v = e - x0. Latents are
float32, coefficients float64. Every draw is a function of its key alone. See the docstrings of `kernels` (the step),
`plans` (the tree), `levels` (its noise), `recipes` (plans of published methods), `curricula` (plans that change),
`pruning`, `rollout` (the engine), `trees` (its result), `regrow` (less memory), `log_prob` and `keys`.
"""

from samplers import curricula, kernels, levels, plans, pruning, recipes, regrow, schedules
from samplers.curricula import Window
from samplers.kernels import Coefficients, Kernel, affine, get_kernel, kernel_names
from samplers.keys import Key, noise
from samplers.levels import Levels
from samplers.log_prob import Density, kl, log_prob
from samplers.plans import Cost, Plan, PlanBuilder
from samplers.regrow import rollout_in_blocks
from samplers.rollout import rollout
from samplers.schedules import dynamic_mu, flux_sigmas, linear_shift_sigmas, sd3_sigmas
from samplers.trees import Edges, Latents, Replay, States, Tree

__all__ = [
    "Coefficients",
    "Cost",
    "Density",
    "Edges",
    "Kernel",
    "Key",
    "Latents",
    "Levels",
    "Plan",
    "PlanBuilder",
    "Replay",
    "States",
    "Tree",
    "Window",
    "affine",
    "curricula",
    "dynamic_mu",
    "flux_sigmas",
    "get_kernel",
    "kernel_names",
    "kernels",
    "kl",
    "levels",
    "linear_shift_sigmas",
    "log_prob",
    "noise",
    "plans",
    "pruning",
    "recipes",
    "regrow",
    "rollout",
    "rollout_in_blocks",
    "schedules",
    "sd3_sigmas",
]
