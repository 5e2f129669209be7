"""Prompt suites: GenEval, HPSv2, T2I-CompBench, UniGenBench, PartiPrompts, DrawBench, and prompts of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.suites.suite import Suite


def suites() -> dict[str, Suite]:
    """Name -> suite."""
    from benchmarks.suites import compbench, geneval, hpsv2, plain, unigenbench

    found = (
        geneval.SUITE, hpsv2.SUITE, compbench.SUITE, unigenbench.SUITE, plain.PARTI_SUITE, plain.DRAWBENCH,
        plain.PROMPTS,
    )  # fmt: skip
    return {suite.name: suite for suite in found}
