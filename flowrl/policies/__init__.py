"""Policies: diffusers pipelines (flow and diffusion models) and a closed-form Gaussian flow, behind one protocol."""

from flowrl.policies.conditioning import Conditioning
from flowrl.policies.gaussian import GaussianPolicy
from flowrl.policies.loading import load_policy
from flowrl.policies.pipeline import PipelinePolicy
from flowrl.policies.protocol import Policy
from flowrl.policies.weights import LoraSettings

__all__ = ["Conditioning", "GaussianPolicy", "LoraSettings", "PipelinePolicy", "Policy", "load_policy"]
