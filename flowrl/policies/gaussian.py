"""A linear-Gaussian flow: the policy on which everything is known in closed form.

Given a prompt with mean m (one number per coordinate), data are x0 ~ N(m, std^2 I). With x_s = (1 - s) x0 + s e:

    V_s = (1 - s)^2 std^2 + s^2                            marginal  x_s ~ N((1 - s) m, V_s)
    v(x, s) = E[e - x0 | x_s = x] = k_s x - (s / V_s) m,   k_s = (s - (1 - s) std^2) / V_s

The policy learns a shift of the mean, m -> m + W m + w (zero at the start), which moves v by -(s / V_s) (W m + w). So
every sampler is a linear recursion, every step's KL to the start a known quadratic, and with a quadratic reward the
point at which policy gradient plus KL stands still is an affine map of m, thus within reach of (W, w) for all prompts
at once (`LinearChain.optimum`). That makes a learning test exact: what a trainer converges to is compared with a
formula, and a sign, a factor, a step or a prompt that is mixed up anywhere shows.
"""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.policies.conditioning import Conditioning
from flowrl.policies.weights import WeightSets
from samplers import get_kernel

LIMIT = 8.0  # coordinates are drawn as pixels in [-LIMIT, LIMIT]
_LEVELS = 2**24 - 1
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def marginal(s: Tensor | float, mean: Tensor | float, std: float) -> tuple[Tensor, Tensor]:
    """Mean (1 - s) m and std sqrt((1 - s)^2 std^2 + s^2) of x_s, float64, elementwise."""
    s, mean = torch.as_tensor(s, dtype=torch.float64), torch.as_tensor(mean, dtype=torch.float64)
    return (1 - s) * mean, ((1 - s) ** 2 * std**2 + s**2).sqrt()


def velocity_coefficients(s: Tensor | float, std: float) -> tuple[Tensor, Tensor]:
    """(k, h) of v = k x + h m: k = (s - (1 - s) std^2) / V_s, h = -s / V_s; float64, elementwise."""
    s = torch.as_tensor(s, dtype=torch.float64)
    variance = (1 - s) ** 2 * std**2 + s**2
    return (s - (1 - s) * std**2) / variance, -s / variance


def gaussian_kl(mean: Tensor, std: Tensor | float, mean_ref: Tensor, std_ref: Tensor | float) -> Tensor:
    """KL of N(mean, std^2) from N(mean_ref, std_ref^2), elementwise; sum over coordinates for the KL of vectors.

    ln(std_ref / std) + (std^2 + (mean - mean_ref)^2) / (2 std_ref^2) - 1/2
    """
    std, std_ref = torch.as_tensor(std, dtype=torch.float64), torch.as_tensor(std_ref, dtype=torch.float64)
    return (std_ref / std).log() + (std**2 + (mean - mean_ref) ** 2) / (2 * std_ref**2) - 0.5


def quadratic_reward(x: Tensor, target: Tensor, curvature: float) -> Tensor:
    """r(x) = -curvature / 2 * sum_j (x_j - target_j)^2; x (N, D) -> (N,)."""
    return -curvature / 2 * (x - target).square().sum(-1)


def tilted(mean: Tensor, std: float, target: Tensor, curvature: float, beta: float) -> tuple[Tensor, float, Tensor]:
    """The KL-regularised optimum over all distributions of x0: p(x) ~ N(x; mean, std^2) exp(r(x) / beta).

    It maximises E[r] - beta KL(p || N(mean, std^2)) for the quadratic reward, is Gaussian again with
        1 / v = 1 / std^2 + curvature / beta,    m = v (mean / std^2 + curvature target / beta),
    and the maximum is
        beta ln Z = beta sum_j [ ln(v / std^2) / 2 - (mean - target)^2 / (2 (std^2 + beta / curvature)) ].
    A sampler reaches it only if its x0 forgets the initial noise and its std may change; what group-relative training
    of `GaussianPolicy` on a given sampler reaches is `LinearChain.optimum`.

    Args: mean, target (D,). Returns m (D,), sqrt(v), beta ln Z (scalar).
    """
    variance = 1 / (1 / std**2 + curvature / beta)
    best = variance * (mean / std**2 + curvature * target / beta)
    log_z = 0.5 * math.log(variance / std**2) - (mean - target) ** 2 / (2 * (std**2 + beta / curvature))
    return best, math.sqrt(variance), beta * log_z.sum()


class Optimum(NamedTuple):
    """The learnt shift at which training stands still: W = weight * I, w = bias (D,)."""

    weight: float
    bias: Tensor


@dataclass(frozen=True)
class LinearChain:
    """A straight sampler x_{i+1} = a_i x_i + b_i v(x_i, s_i) + c_i noise on the Gaussian flow, from x_0 ~ N(0, 1).

    sigmas (T + 1,), a, b, c (T,): float64. std: of the data. With v = k x + h m a step is
    x' = (a + b k) x + b h m + c noise, so that means and variances follow by recursion.
    """

    sigmas: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    std: float

    @classmethod
    def make(cls, sigmas: Tensor, std: float, kernel: str = "flow", level: float = 0.7) -> "LinearChain":
        """Steps of one kernel at one level, the last one without noise (as a straight plan has them by default)."""
        a, b, c = get_kernel(kernel).coefficients(sigmas[:-1], sigmas[1:], level)
        a, b, c = a.clone(), b.clone(), c.clone()
        a[-1], b[-1], c[-1] = 1.0, sigmas[-1] - sigmas[-2], 0.0
        return cls(sigmas.double(), a, b, c, std)

    def _steps(self) -> tuple[Tensor, Tensor]:
        """(a + b k, b h) of every step."""
        k, h = velocity_coefficients(self.sigmas[:-1], self.std)
        return self.a + self.b * k, self.b * h

    def moments(self, mean: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean (T + 1, ...) and std (T + 1,) of every state for data of mean `mean` (any shape)."""
        contraction, push = self._steps()
        mean = torch.as_tensor(mean, dtype=torch.float64)
        means, variances = [torch.zeros_like(mean)], [torch.ones((), dtype=torch.float64)]
        for i in range(len(self.a)):
            means.append(contraction[i] * means[-1] + push[i] * mean)
            variances.append(contraction[i] ** 2 * variances[-1] + self.c[i] ** 2)
        return torch.stack(means), torch.stack(variances).sqrt()

    def gain(self, trained: Sequence[int] | None = None) -> float:
        """d(mean of the result) / d(mean of the data), through the steps `trained` only (None: all).

        sum_i b_i h_i prod_{j > i} (a_j + b_j k_j)
        """
        contraction, push = self._steps()
        steps = range(len(self.a)) if trained is None else trained
        return float(sum(push[i] * contraction[i + 1 :].prod() for i in steps))

    def kl_curvature(self, trained: Sequence[int], form: str = "exact") -> float:
        """Q of the path KL over the steps `trained`: a shift delta of the mean costs Q |delta|^2 / 2.

        Step i costs b_i^2 |v - v_ref|^2 / (2 c_i^2) with v - v_ref = h_i delta, so Q = sum_i (b_i h_i / c_i)^2; with
        form "published" step i counts d_i = s_i - s_{i+1} times.
        """
        if form not in ("exact", "published"):
            raise ValueError(f"got KL form {form!r}; expected 'exact' or 'published'")
        _, push = self._steps()
        d = self.sigmas[:-1] - self.sigmas[1:] if form == "published" else torch.ones_like(self.a)
        return float(sum(d[i] * (push[i] / self.c[i]) ** 2 for i in trained))

    def optimum(
        self,
        target: Tensor,
        curvature: float,
        kl_weight: float,
        trained: Sequence[int],
        group_size: int | None = None,
        form: str = "exact",
    ) -> Optimum:
        """Where group-relative policy gradient on `quadratic_reward` with a KL penalty stands still, for every mean m.

        The update ascends E[A grad log p] - kl_weight grad KL over the steps `trained`, with A = r - (group's mean) and
        no division by a std. A group of K that contains the sample itself gives (1 - 1/K) of the policy gradient, and
        steps that are not trained carry none, though they move the result. With G = gain(), the result's mean is
        G (m + delta); with F = (1 - 1/K) curvature gain(trained) the update is zero where

            F (target - G (m + delta)) = kl_weight Q delta,   so   delta = F / (kl_weight Q + F G) (target - G m)

        Averages over latent elements or over edges scale both sides alike. group_size: K, None for no such factor.
        A flipped reward is a negative curvature; there is a point of rest as long as kl_weight Q + F G > 0.
        """
        force = curvature * self.gain(trained) * (1.0 if group_size is None else 1 - 1 / group_size)
        rho = force / (kl_weight * self.kl_curvature(trained, form) + force * self.gain())
        return Optimum(-rho * self.gain(), rho * torch.as_tensor(target, dtype=torch.float64))


class GaussianPolicy:
    """The flow above as a policy (see `protocol.Policy`): latents (N, D, 1, 1), trainable W (D, D) and w (D,).

    A prompt is any text that holds D numbers, the mean of its data ("mean 0.5 -1"). Images are (N, 3, 1, D): pixel j is
    coordinate j as a 24-bit number in its three channels, so that the 8-bit grid loses nothing (3e-6 at most); a reward
    function gets x0 back with `GaussianPolicy.read(images)`.
    """

    resolution = 1

    def __init__(self, dim: int = 2, std: float = 0.5, device: str | torch.device = "cpu"):
        self.name = "gaussian"
        self.dim, self.std, self.device = dim, std, torch.device(device)
        self.weight = nn.Parameter(torch.zeros(dim, dim, device=self.device))
        self.bias = nn.Parameter(torch.zeros(dim, device=self.device))
        self.sets = WeightSets({"weight": self.weight, "bias": self.bias})
        self.copy_weights("current", "reference")

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(D, 1, 1), whatever the image size."""
        return self.dim, 1, 1

    def sigmas(self, steps: int, height: int | None = None, width: int | None = None) -> Tensor:
        """float64 (steps + 1,): evenly spaced from 1 to 0."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def prior_std(self, s: float) -> float:
        """1, the std of the noise of a flow."""
        return 1.0

    def encode(self, prompts: Sequence[str], negative: str = "") -> Conditioning:
        """{"mean": (N, D)} read from the prompts; the unconditional row is the mean 0. Raises UserError."""
        means = [[float(number) for number in _NUMBER.findall(prompt)] for prompt in prompts]
        for prompt, mean in zip(prompts, means, strict=True):
            if len(mean) != self.dim:
                raise UserError(
                    f"got prompt {prompt!r} with {len(mean)} numbers; expected {self.dim}, the mean of its data; "
                    f"write for example {'mean ' + ' '.join(['0.5'] * self.dim)!r}"
                )
        zero = torch.zeros(1, self.dim, device=self.device)
        return Conditioning({"mean": torch.tensor(means, device=self.device)}, {"mean": zero})

    def predict(self, latents: Tensor, s: Tensor, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        """v = k x + h (m + W m + w), (N, D, 1, 1) float32; guidance mixes the means, in which v is linear."""
        mean = self._mean(cond.rows["mean"])
        if guidance != 1:
            assert cond.uncond is not None  # `encode` always gives it
            free = self._mean(cond.uncond["mean"])
            mean = free + guidance * (mean - free)
        k, h = (value.to(self.device, torch.float32).view(-1, 1, 1, 1) for value in velocity_coefficients(s, self.std))
        return k * latents + h * mean[:, :, None, None]

    def _mean(self, mean: Tensor) -> Tensor:
        # by products and sums, not by a matrix product: a row's bits then do not depend on the batch
        return mean + (mean[:, None, :] * self.weight).sum(-1) + self.bias

    def calls(self, guidance: float = 1.0) -> int:
        """1: guidance costs no second row here."""
        return 1

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, 1, D) of x0, clamped to +-8. The gradient of `read(decode(x))` with respect to x is 1."""
        x = latents.flatten(1)
        level = ((x.detach().double().clamp(-LIMIT, LIMIT) + LIMIT) / (2 * LIMIT) * _LEVELS).round()
        digits = torch.stack([level // 65536, level // 256 % 256, level % 256], dim=1)
        images = (digits / 255).float()
        slope = _LEVELS / (2 * LIMIT) / (255 * 65536)  # straight through: the leading digit carries the gradient
        images[:, 0] = images[:, 0] + (x - x.detach()) * slope
        return images[:, :, None, :]

    @staticmethod
    def read(images: Tensor) -> Tensor:
        """x0 (N, D) from images (N, 3, 1, D) made by `decode`, also after rounding to 8 bits."""
        digits = 255 * images[:, :, 0, :].double()
        level = 65536 * digits[:, 0] + 256 * digits[:, 1] + digits[:, 2]
        return (level / _LEVELS * 2 * LIMIT - LIMIT).float()

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Use another weight set inside the block; "reference" is the start (no shift)."""
        return self.sets.use(name)

    @torch.no_grad()
    def copy_weights(self, source: str, target: str, decay: float | None = None) -> None:
        """target <- source, or target <- decay * target + (1 - decay) * source."""
        self.sets.copy(source, target, decay)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """[("weight", W), ("bias", w)]."""
        return list(self.sets.current.items())

    def named_states(self) -> dict[str, Tensor]:
        """All weight sets as "set/parameter"."""
        return self.sets.states()

    @torch.no_grad()
    def load_named_states(self, states: dict[str, Tensor]) -> None:
        """Inverse of `named_states`. Raises UserError where they do not fit."""
        self.sets.load(states)
