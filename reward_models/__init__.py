"""Scorers, detectors and judges of images. Imports neither the samplers nor flowrl."""

from .loading import load, names
from .protocol import Reward, RewardError, RewardResult, RewardSpec, checked_score, to_8bit

__all__ = ["Reward", "RewardError", "RewardResult", "RewardSpec", "checked_score", "load", "names", "to_8bit"]
