"""Judges: vision-language models behind an endpoint that rate images or compare them, and win rates as a reward."""

from .endpoint import ChatEndpoint
from .pairwise import Comparison, PairJudge, ScorerJudge
from .win_rate import WinRate

__all__ = ["ChatEndpoint", "Comparison", "PairJudge", "ScorerJudge", "WinRate"]
