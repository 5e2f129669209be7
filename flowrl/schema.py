"""The schema of a run: one frozen model per section of the YAML file.

Types and single-value ranges live here; rules that join several values are in `flowrl.config_checks`, reading and
error messages in `flowrl.config`. Every field carries a description: it is what error messages quote.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Pixels = Annotated[int, Field(ge=8, multiple_of=8)]
KernelName = Literal["ode", "flow", "dance", "cps", "precise", "dance_precise", "ddim", "consistency"]
Reduction = Literal["mean", "sum"]
DensityName = Literal["gaussian", "unscaled"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "swanlab"]
RewardSpec = str | dict[str, Any]


class Section(BaseModel):
    """Settings shared by all sections: no unknown key, no silent conversion, no infinity, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Lora(Section):
    rank: Positive = Field(16, description="rank of the low-rank update; 4 to 128")
    alpha: float = Field(
        32.0, gt=0.0, description="the update is scaled by alpha / rank; usually 1 to 2 times the rank"
    )
    targets: list[str] | None = Field(
        None, description="module names that get an adapter; null takes the published set of the pipeline class"
    )
    init: Literal["gaussian", "kaiming"] = Field(
        "gaussian", description="how the first factor is drawn; the second is 0"
    )
    start_from: str | None = Field(None, alias="from", description="folder or file of a LoRA to continue from")


class PolicyConfig(Section):
    path: str = Field(min_length=1, description="a diffusers pipeline: bundled name, local folder or hub id")
    revision: str | None = Field(None, description="hub branch, tag or commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="compute type of the network; latents and trained weights stay float32; auto is bfloat16 where the "
        "device computes in it natively, else float32",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    train: Literal["lora", "full"] = Field("lora", description="train adapters, or all weights of the network")
    reference: bool = Field(
        True, description="keep a reference for the KL term: with LoRA the base, free; with train: full one more copy"
    )
    lora: Lora = Field(default_factory=Lora, description="adapter settings, used with train: lora")
    quantize: Literal["int8", "nf4"] | None = Field(None, description="quantise the frozen base weights (needs LoRA)")
    attention: Literal["native", "xformers", "flash"] = Field("native", description="attention backend of the network")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the update: less memory, slower")
    embedding_cache: bool = Field(
        True, description="encode each prompt once, keep the result on disk and drop the text encoders"
    )


class PromptConfig(Section):
    source: str = Field(
        min_length=1,
        description="shapes:train|test|held_out, a .txt, .jsonl or .csv file, or hub:dataset[:split]#column",
    )
    tasks: list[str] | None = Field(None, min_length=1, description="keep only prompts whose tag is listed")
    text_column: str | None = Field(None, description="column or key that holds the text; default: prompt")
    limit: Positive | None = Field(None, description="keep only N prompts, spread evenly over their tags")


class Window(Section):
    size: Positive = Field(2, description="number of consecutive steps with noise and training; ODE elsewhere")
    low: Count = Field(0, description="first step at which the window may start")
    high: Positive | None = Field(None, description="the window ends before this step; null: half of the steps")
    move: Literal["random", "progressive", "frozen"] = Field(
        "random", description="drawn anew for each update; from low towards high; or always at low"
    )
    every: Positive = Field(25, description="updates at one position (progressive); MixGRPO 25, TreeGRPO 50")
    stride: Positive = Field(1, description="steps between two positions (progressive)")
    at_end: Literal["restart", "stop"] = Field("restart", description="after the last position (progressive)")
    decay: float = Field(0.0, ge=0.0, description="shortens the stay at late steps, exponentially; MixGRPO has 0.1")
    decay_from: Count = Field(13, description="first step whose stay is shorter; MixGRPO has 13 of 25")
    least: Positive | None = Field(
        None, description="in place of decay: the stay shortens in a straight line towards this (MixGRPO: every // 4)"
    )


class RewardDriven(Section):
    rise: float = Field(0.3, ge=0.0, description="relative rise at success 0")
    fall: float = Field(0.2, ge=0.0, lt=1.0, description="relative fall at success 1")
    low: float = Field(0.2, ge=0.0, description="least level")
    high: float = Field(1.0, gt=0.0, description="largest level")
    memory: float = Field(
        0.9,
        ge=0.0,
        lt=1.0,
        description="success = moving average of (mean - worst) / (best - worst) of the update's rewards",
    )


class Levels(Section):
    shape: Literal["constant", "growth", "cosine", "splits"] = Field(
        "constant", description="level by step and depth: rollout.level, growing with depth, falling, or one per split"
    )
    growth: float = Field(0.5, gt=-1.0, description="growth: level (1 + growth depth / splits); below 0 it falls")
    low: float = Field(0.2, ge=0.0, description="cosine: level towards which rollout.level falls")
    values: list[float] | None = Field(None, min_length=1, description="splits: one level per split, first split first")
    equal_budget: bool = Field(
        False,
        description="rescale to the sum of squared levels that the constant rollout.level has over the same steps",
    )
    reward_driven: RewardDriven | None = Field(
        None, description="then more noise while rewards are low, less when they are high"
    )


class SplitDraw(Section):
    around: Literal["places", "success"] = Field(
        "places", description="where splits are likely: around their places, or the earlier the better the policy does"
    )
    concentration: float = Field(6.0, gt=0.0, description="how near they stay; TMPO has 6 (places) and 4 (success)")
    low: Count = Field(1, description="first step that may split")
    high: Positive | None = Field(None, description="last step that may split; null: the last one with noise")
    gap: Positive = Field(1, description="least distance of two splits")


class TreeConfig(Section):
    branch: Positive | list[Positive] = Field(2, description="children at every split, or one number per split")
    at: list[Count] | None = Field(None, min_length=1, description="steps that split; null: those of rollout.window")
    noise: Literal["all", "splits"] = Field(
        "all", description="with `at`: noise and training on all trained steps, or only where the tree splits"
    )
    promote: Count | None = Field(
        None,
        description="a first split at this step or before it becomes roots with noise of their own (noise: splits)",
    )
    moves_to: list[Count] | None = Field(None, description="the splits move from `at` to these steps; null: they stay")
    moves_over: Positive | None = Field(None, description="updates of that move; null: all")
    draw: SplitDraw | None = Field(
        None, description="split at steps drawn anew for each update (TMPO); null: at the given ones"
    )
    untrained_depths: list[Positive] | None = Field(
        None, min_length=1, description="depths whose edges are not trained; depth 1 is the end of the first step"
    )
    depths_every: Positive = Field(30, description="updates after which those depths move up by one")
    depths_stop: Positive | None = Field(None, description="least depth that they reach; null: they stay")


class TrunkConfig(Section):
    at: list[Count] = Field(min_length=1, description="steps of the ODE trunk at which branches leave it")
    branches: Positive = Field(6, description="branches of one noisy step each, per listed step")
    strides: list[Positive] = Field(
        [1], min_length=1, description="each branch is finished once per stride, on every stride-th remaining time"
    )
    finish: bool = Field(False, description="lead the trunk to the data too: one image more, which is not trained")


class ForkConfig(Section):
    branches: Annotated[int, Field(ge=2)] = Field(5, description="children of the fork")
    first: Annotated[int, Field(ge=2)] = Field(description="last steps that are trained, at the start of the run")
    last: Annotated[int, Field(ge=2)] = Field(description="last steps that are trained, at its end")
    over: Positive | None = Field(None, description="updates of that growth; null: all")


class TailConfig(Section):
    fraction: Share = Field(0.4, description="the n noise-free steps that end a path become round(fraction n)")
    solver: Literal["ode", "ode2"] = Field("ode2", description="Euler, or DPM-Solver++ 2M")


class RolloutConfig(Section):
    steps: Annotated[int, Field(ge=2)] = Field(8, description="denoising steps while training; 4 to 20")
    guidance: float = Field(1.0, ge=0.0, description="guidance scale in rollout and update; 1 is none and costs half")
    height: Pixels | None = Field(None, description="image height in pixels; null: what the pipeline was made for")
    width: Pixels | None = Field(None, description="image width in pixels; null: what the pipeline was made for")
    kernel: KernelName = Field("flow", description="how one denoising step draws its noise")
    level: float | None = Field(
        None,
        ge=0.0,
        description="noise level; 0 is the ODE and cannot be trained; null: the published one of the kernel (flow 0.7, "
        "dance and dance_precise 0.3, cps 0.8, precise 1.5, ddim and consistency 1)",
    )
    levels: Levels = Field(default_factory=Levels, description="how the level depends on step and depth")
    reduction: Reduction = Field("mean", description="log-probability: mean or sum over latent elements")
    density: DensityName = Field("gaussian", description="gaussian, or unscaled (without the factor 1 / (2 c^2))")
    shift: float | None = Field(
        None, gt=0.0, description="train on even times, shifted once by this (DanceGRPO: 3); null: the model's own"
    )
    train_fraction: Share = Field(0.99, description="share of the steps that is trained; the last one never is")
    train_choice: Literal["leading", "random"] = Field(
        "leading", description="which share: the leading steps, or others drawn for each update (DanceGRPO)"
    )
    window: Window | None = Field(None, description="noise and training only in a window of steps, ODE elsewhere")
    tree: TreeConfig | None = Field(None, description="a tree over the window, or over listed steps")
    trunk: TrunkConfig | None = Field(None, description="an ODE trunk with SDE branches (TempFlow, Granular-GRPO)")
    fork: ForkConfig | None = Field(None, description="one fork, from which on steps are trained (B2-DiffuRL)")
    solver: Literal["ode", "ode2"] = Field("ode", description="of steps without noise: Euler, or DPM-Solver++ 2M")
    tail: TailConfig | None = Field(None, description="a coarser way from the last noise to the image (MixGRPO-Flash)")
    max_leaves: Positive = Field(1024, description="most images of one root; a typing error must not fill the memory")
    shared_noise: bool = Field(False, description="all images of a group start from the same noise")
    chunk: Positive = Field(64, description="rows per model call; halved by itself when memory runs out")
    recompute: bool = Field(
        False, description="keep no latents for the update, but sample them again when it needs them: slower"
    )

    @property
    def trained_steps(self) -> int:
        """Number of steps that may be trained: int(steps * fraction), never the last step."""
        return min(int(self.steps * self.train_fraction), self.steps - 1)

    @property
    def window_range(self) -> tuple[int, int] | None:
        """Half-open range of steps the window stays in, or None without a window."""
        if self.window is None:
            return None
        return self.window.low, self.steps // 2 if self.window.high is None else self.window.high


class AdvantageConfig(Section):
    combine: Literal["sum", "advantages", "pareto"] = Field(
        "sum",
        description="several rewards: advantages of their weighted sum; weighted sum of their advantages (DanceGRPO, "
        "Pref-GRPO); or that of the images which no other one of their prompt beats in every reward (Parrot)",
    )
    renormalise: bool = Field(
        False, description="advantages, pareto: divide that sum by its standard deviation over the update (GDPO)"
    )
    std: Literal["global", "prompt", "none", "history"] = Field(
        "global",
        description="divide by the standard deviation of all samples of the update, of the prompt, or not; history: "
        "mean and deviation of the prompt's rewards in this update and `updates` before it (B2-DiffuRL)",
    )
    clip: float | None = Field(5.0, gt=0.0, description="bound on |advantage|; null: none")
    eps: float = Field(1e-4, ge=0.0, description="added to the standard deviation")
    floor: float | None = Field(
        None,
        ge=0.0,
        description="logged only: groups whose rewards spread less are called narrow; null: a tenth of the update's",
    )
    updates: Count = Field(8, description="history: earlier updates that are remembered")


class CreditConfig(Section):
    rule: Literal["leaf_mean", "sibling", "path", "path_average", "depth_z_score"] = Field(
        "leaf_mean", description="from the advantages of leaves to those of edges, see flowrl/credit.py"
    )
    weights: Literal["share", "one"] = Field(
        "share", description="weight of an edge in the loss: its share of the root's leaves, or 1 (published)"
    )
    steps: Literal["noise"] | list[float] | None = Field(
        None, description="weight of the policy term by step: its noise (TempFlow-GRPO), or one number per step"
    )
    scope: Literal["tree", "prompt"] = Field("tree", description="depth_z_score: compare within a tree, or a prompt")
    shrink: float = Field(0.0, ge=0.0, description="depth_z_score: degrees of freedom lent from all leaves; 0 is raw")
    floor: float = Field(0.0, ge=0.0, description="depth_z_score: least standard deviation")
    ddof: Literal[0, 1] = Field(1, description="depth_z_score: 1 sample, 0 population standard deviation")
    select: Literal["better_half", "extremes", "top_bottom", "branch_best_worst"] | None = Field(
        None,
        description="leaves whose paths are trained: the better half of each last split, the best and worst of each "
        "tree, of each prompt (DanceGRPO), or of each fork if good and bad enough (B2-DiffuRL); null: all",
    )
    fraction: float = Field(0.25, gt=0.0, le=0.5, description="extremes, top_bottom: share of leaves at each end")
    threshold: float = Field(0.5, ge=0.0, description="branch_best_worst: least |advantage| of a chosen leaf")


class KL(Section):
    form: Literal["exact", "published"] = Field(
        "exact", description="exact divides by 2 c^2; published is d times that"
    )
    weight: float = Field(
        0.0, ge=0.0, description="weight of the KL to the reference (LoRA: the base without it); 0 switches it off"
    )


class MeasuredWith(Section):
    kernel: KernelName = Field("flow", description="kernel the numbers were chosen for")
    reduction: Reduction = Field("mean", description="reduction the numbers were chosen for")
    density: DensityName = Field("gaussian", description="density the numbers were chosen for")


class AdaptiveClip(Section):
    max: float = Field(gt=0.0, lt=1.0, description="lower bound that paths of high reward approach")
    max_high: float | None = Field(None, gt=0.0, description="upper bound that they approach; null: same as max")
    sensitivity: float = Field(1.0, description="how fast; below 0 bad paths get the wide bounds")


class GuardOptions(Section):
    ratio_norm: bool = Field(True, description="centre and scale the log-ratio of every step")
    reweight: Literal["jacobian", "step", "none"] = Field(
        "jacobian", description="divide the policy term by |b| = |dm/dv|, by the step length (released code), or not"
    )


class DppoOptions(Section):
    threshold: float = Field(1e-5, gt=0.0, description="a step whose policy has moved further drops out")


class TmpoOptions(Section):
    beta: float = Field(15.0, gt=0.0, description="sharpness of the target softmax(beta advantage)")
    beta_from: float | None = Field(None, gt=0.0, description="beta in the first update; null: it does not change")
    beta_over: Positive | None = Field(None, description="updates in which it gets from there to beta; null: all")
    form: Literal["clipped", "squared"] = Field(
        "clipped", description="clipped: as released; squared: the paper's loss"
    )
    guard: bool = Field(True, description="GRPO-Guard's weights on the clipped form")


class AdversaryConfig(Section):
    references: str = Field(
        description="what the reward learns to prefer: a folder of images, a manifest of files by prompt, shapes:draw"
    )
    limit: Positive | None = Field(None, description="use only N of the references (of each prompt in a manifest)")
    per_prompt: Positive = Field(8, description="references for each prompt of an update")
    schedule: Literal["alternate", "trigger"] = Field(
        "alternate", description="the reward learns in a fixed ratio, or only when it likes references less than images"
    )
    discriminator: Positive = Field(9, description="steps of the reward when it is its turn")
    generator: Positive = Field(1, description="alternate: updates of the policy for each of its turns")
    reuse: bool = Field(
        True, description="the policy learns from every rollout; published: not from those that train the reward"
    )


class NftOptions(Section):
    beta: float = Field(1.0, gt=0.0, description="how far the two matched velocities are from the sampling one")
    advantage_clip: float = Field(5.0, gt=0.0, description="advantage of an image that counts as wholly good")
    times: Positive | None = Field(None, description="times per image that are trained; null: all of the schedule")
    time_fraction: Share = Field(0.99, description="share of the schedule's times, from noise on, that is used")
    shared_noise: bool = Field(
        False, description="images of a group get the same times and noise, which then cancels in their comparison"
    )
    decay_rate: float = Field(
        0.001,
        ge=0.0,
        description="the sampling weights keep min(decay_rate n, decay_max) of themselves after n updates",
    )
    decay_max: Rate = Field(0.5, description="most that they keep")
    decay_start: Count = Field(
        0, description="n counts from this update on, before which they keep nothing (published also: 75, with rate "
        "0.0075 and max 0.999)",
    )  # fmt: skip


class LayerTuningConfig(Section):
    weight: float = Field(0.1, ge=0.0, description="weight of the supervised term (the published value is unknown)")
    target: Literal["image", "velocity"] = Field(
        "image",
        description="v* = (x_s - best image) / s, or the best path's own velocity (published; no gradient on it)",
    )
    states: Literal["path", "all"] = Field("path", description="states that imitate: of the best path, or of its tree")
    weighting: Literal["progress", "uniform"] = Field("progress", description="layers count by the progress made there")
    best: Literal["group", "tree"] = Field("group", description="one image to imitate per prompt, or per tree")
    floor: float | Literal["mean"] | None = Field(
        "mean", description="least reward worth imitating: a number, the mean of the update, or null for none"
    )
    decay: Positive | None = Field(None, description="updates over which the weight falls to 0; null: it stays")


class ObjectiveConfig(Section):
    name: Literal["clipped", "guard", "dppo", "tmpo", "nft"] = Field(
        "clipped",
        description="the loss: PPO's clipped ratio (Flow-GRPO), GRPO-Guard, Flow-DPPO, TMPO's trajectory balance, or "
        "DiffusionNFT on finished images",
    )
    clip_range: float = Field(1e-4, gt=0.0, lt=1.0, description="the ratio is clipped below at 1 - clip_range")
    clip_range_high: float | None = Field(
        None, gt=0.0, description="the ratio is clipped above at 1 + this; null: same as clip_range"
    )
    adaptive_clip: AdaptiveClip | None = Field(
        None, description="clipped: bounds that widen with the advantage (Dynamic-TreeRPO)"
    )
    guard: GuardOptions | None = Field(None, description="settings of guard; null: its defaults")
    dppo: DppoOptions | None = Field(None, description="settings of dppo; null: its defaults")
    tmpo: TmpoOptions | None = Field(None, description="settings of tmpo; null: its defaults")
    nft: NftOptions | None = Field(None, description="settings of nft; null: its defaults")
    layer_tuning: LayerTuningConfig | None = Field(
        None, description="imitation of the best path inside the loss (Dynamic-TreeRPO's LayerTuning-RL)"
    )
    kl: KL = Field(default_factory=KL, description="penalty on leaving the reference")
    guidance: float | None = Field(
        None, ge=0.0, description="guidance in the update; null: that of the rollout, which a likelihood needs"
    )
    measured_with: MeasuredWith = Field(
        default_factory=MeasuredWith,
        description="the density that clip_range and kl.weight were chosen for; must be the rollout's",
    )

    @property
    def clip(self) -> tuple[float, float]:
        """(low, high): the ratio is clipped to [1 - low, 1 + high]."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit needs bitsandbytes")
    lr: float = Field(3e-4, gt=0.0, description="learning rate; LoRA 1e-4 to 5e-4, full 1e-6 to 1e-5")
    betas: Annotated[tuple[Rate, Rate], Strict(False)] = Field(
        (0.9, 0.999), description="two decay rates of Adam, each in [0, 1)"
    )
    weight_decay: float = Field(1e-4, ge=0.0, description="decoupled weight decay")
    eps: float = Field(1e-8, gt=0.0, description="Adam's epsilon")
    grad_clip: float | None = Field(1.0, gt=0.0, description="largest gradient norm; null: not clipped")
    inner_updates: Positive = Field(
        1, description="optimizer steps per rollout, each on its share of the prompts; divides prompts_per_update"
    )
    epochs: Positive = Field(1, description="passes over one rollout")
    micro_batch: Positive = Field(64, description="rows per forward and backward; changes memory and speed only")
    warmup: Count = Field(0, description="updates over which the learning rate rises linearly")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate: it stays, or falls to 0 at the end of the run"
    )


class EMAConfig(Section):
    decay: float = Field(0.9, ge=0.0, lt=1.0, description="weight of the old average")
    ramp: bool = Field(True, description="use min(decay, (1 + n) / (10 + n)) after n optimizer steps")
    every: Positive = Field(1, description="optimizer steps between two averagings")


class EvalConfig(Section):
    prompts: str = Field("shapes:test", min_length=1, description="prompt source for evaluation, never trained on")
    tasks: list[str] | None = Field(None, min_length=1, description="keep only prompts whose tag is listed")
    text_column: str | None = Field(None, description="column or key that holds the text; default: prompt")
    limit: Positive | None = Field(None, description="keep only N prompts, spread evenly over their tags")
    images_per_prompt: Positive = Field(4, description="images of each prompt, with fixed seeds")
    steps: Positive = Field(20, description="ODE steps")
    guidance: float = Field(1.0, ge=0.0, description="guidance scale, the same before and after")
    baseline_guidance: float | None = Field(
        None, ge=0.0, description="also show the untrained model at this guidance; null: do not"
    )
    height: Pixels | None = Field(None, description="image height in pixels; null: what the pipeline was made for")
    width: Pixels | None = Field(None, description="image width in pixels; null: what the pipeline was made for")
    every: Count = Field(0, description="evaluate every N updates; 0: only before the first and after the last")
    every_s: float | None = Field(
        None, gt=0.0, description="evaluate whenever so many seconds were trained; null: do not"
    )
    rewards: RewardSpec = Field(
        default_factory=lambda: {"shapes": 1.0}, description="what is reported; any form that reward takes"
    )
    judge: RewardSpec | None = Field(
        "tiny-clip",
        description="a CLIP-type scorer that is never trained on: a name, or {clip: {path: FOLDER}}; null: none",
    )


class CheckpointConfig(Section):
    every: Count = Field(10, description="save every N updates; 0: only at the end and on SIGTERM")
    keep: Positive = Field(2, description="number of checkpoints kept; 2 lets a damaged one be skipped")


class LoggingConfig(Section):
    trackers: list[TrackerName] = Field(
        default_factory=list, description="accelerate trackers beside the local metrics.jsonl"
    )
    project: str = Field("flowrl", description="project name shown by the trackers")
    samples_every: Count = Field(20, description="draw the sample sheet every N updates; 0: before and after only")
    sample_prompts: Count = Field(8, description="prompts on the sample sheet")


class SelfCheck(Section):
    enabled: bool = Field(True, description="replay the first rollout before the first optimizer step")
    bound: float = Field(
        1e-5, ge=0.0, description="largest |ratio - 1| in float32 on an accelerator; on a CPU it must be exactly 0"
    )
    bound_low_precision: float | None = Field(
        None, ge=0.0, description="largest |ratio - 1| in bfloat16 and float16; null: the clip range"
    )


class Alarms(Section):
    window: Annotated[int, Field(ge=2)] = Field(10, description="updates averaged at each end when a trend is judged")
    judge_drop: float = Field(2.0, gt=0.0, description="fall of the judge, in standard errors, while the reward rises")
    diversity_drop: float = Field(0.3, gt=0.0, description="relative fall of in-group diversity while the reward rises")
    statistic_change: float = Field(
        0.5, gt=0.0, description="relative change of saturation, sharpness or dark fraction while the reward rises"
    )
    stop: bool = Field(False, description="end the run with exit code 3 at the first alarm instead of only saying so")


class Config(Section):
    method: str = Field("flow_grpo", min_length=1, description="label of the recipe in logs and reports")
    output_dir: str = Field(min_length=1, description="run folder; must be new, or hold this run to resume")
    seed: int = Field(0, ge=0, lt=2**63, description="everything random follows from it")
    threads: Positive | None = Field(None, description="CPU threads of torch; null: leave as it is")
    policy: PolicyConfig = Field(description="the model that is trained")
    reward: RewardSpec = Field(
        description="a name, module:attribute, or a mapping of names to weights or to {weight:, option: ...}"
    )
    adversary: AdversaryConfig | None = Field(
        None, description="how a reward that learns is trained beside the policy (Adv-GRPO); null: none does"
    )
    prompts: PromptConfig = Field(description="the prompts that are trained on")
    budget_s: float | None = Field(
        None, gt=0.0, description="end after so many seconds of training, evaluation not counted; null: only by updates"
    )
    clock: Literal["wall", "cpu"] = Field(
        "wall", description="seconds of budget_s and eval.every_s: on the wall, or of this process's CPU time"
    )
    updates: Positive = Field(description="number of rollouts, each followed by inner_updates optimizer steps")
    prompts_per_update: Positive = Field(description="prompts (groups) per update over all processes")
    group_size: Annotated[int, Field(ge=2)] = Field(description="images per prompt; 8 to 32")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="how images are drawn while training")
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig, description="from rewards to advantages")
    credit: CreditConfig = Field(default_factory=CreditConfig, description="from the leaves of a tree to its edges")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="from advantages to a loss")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="from the loss to new weights")
    ema: EMAConfig | None = Field(None, description="moving average of the weights, which is what gets exported")
    eval: EvalConfig | None = Field(default_factory=EvalConfig, description="evaluation before, during and after")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="saving and resuming")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="trackers and sample sheets")
    self_check: SelfCheck = Field(default_factory=SelfCheck, description="is the policy on-policy before it learns?")
    alarms: Alarms = Field(default_factory=Alarms, description="signs that the reward is being hacked")
