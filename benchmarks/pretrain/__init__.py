"""Pretraining of the models in the box, on rendered Shapes scenes alone.

    python -m benchmarks.pretrain vae      the autoencoder
    python -m benchmarks.pretrain latents  scenes to latents, once
    python -m benchmarks.pretrain flow     the text encoders and the transformer of tiny-sd3
    python -m benchmarks.pretrain sd       the text encoder and the UNet of tiny-sd
    python -m benchmarks.pretrain clip     tiny-clip, the held-out judge
    python -m benchmarks.pretrain export   the folders that ship, with their model cards

Every stage is seeded, resumes from its last checkpoint when it is started again, and prints its rate and time left.
"""

from reward_models.torchvision_ops import ready

ready()  # before transformers and diffusers, which import torchvision where it is installed
