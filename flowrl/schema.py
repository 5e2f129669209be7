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
    size: Positive = Field(2, description="number of consecutive steps with noise, drawn anew for each update")
    low: Count = Field(0, description="first step at which the window may start")
    high: Positive | None = Field(None, description="the window ends before this step; null: half of the steps")


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
    reduction: Reduction = Field("mean", description="log-probability: mean or sum over latent elements")
    density: DensityName = Field("gaussian", description="gaussian, or unscaled (without the factor 1 / (2 c^2))")
    train_fraction: Share = Field(0.99, description="share of leading steps that is trained; the last one never is")
    window: Window | None = Field(None, description="noise and training only in a random window, ODE elsewhere")
    shared_noise: bool = Field(False, description="all images of a group start from the same noise")
    chunk: Positive = Field(64, description="rows per model call; halved by itself when memory runs out")

    @property
    def trained_steps(self) -> int:
        """Number of leading steps that may be trained: int(steps * fraction), never the last step."""
        return min(int(self.steps * self.train_fraction), self.steps - 1)

    @property
    def window_range(self) -> tuple[int, int] | None:
        """Half-open range of steps the window stays in, or None without a window."""
        if self.window is None:
            return None
        return self.window.low, self.steps // 2 if self.window.high is None else self.window.high


class AdvantageConfig(Section):
    std: Literal["global", "prompt", "none"] = Field(
        "global", description="divide by the standard deviation of all samples of the update, of the prompt, or not"
    )
    clip: float | None = Field(5.0, gt=0.0, description="bound on |advantage|; null: none")
    eps: float = Field(1e-4, ge=0.0, description="added to the standard deviation")


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


class ObjectiveConfig(Section):
    name: Literal["clipped"] = Field("clipped", description="the loss; clipped is PPO's clipped ratio, as in Flow-GRPO")
    clip_range: float = Field(1e-4, gt=0.0, lt=1.0, description="the ratio is clipped below at 1 - clip_range")
    clip_range_high: float | None = Field(
        None, gt=0.0, description="the ratio is clipped above at 1 + this; null: same as clip_range"
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
    prompts: PromptConfig = Field(description="the prompts that are trained on")
    updates: Positive = Field(description="number of rollouts, each followed by inner_updates optimizer steps")
    prompts_per_update: Positive = Field(description="prompts (groups) per update over all processes")
    group_size: Annotated[int, Field(ge=2)] = Field(description="images per prompt; 8 to 32")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="how images are drawn while training")
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig, description="from rewards to advantages")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="from advantages to a loss")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="from the loss to new weights")
    ema: EMAConfig | None = Field(None, description="moving average of the weights, which is what gets exported")
    eval: EvalConfig | None = Field(default_factory=EvalConfig, description="evaluation before, during and after")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="saving and resuming")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="trackers and sample sheets")
    self_check: SelfCheck = Field(default_factory=SelfCheck, description="is the policy on-policy before it learns?")
    alarms: Alarms = Field(default_factory=Alarms, description="signs that the reward is being hacked")
