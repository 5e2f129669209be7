"""Shapes: a picture world of coloured shapes on a plain ground, with a GenEval-like grammar.

grammar   prompts, their GenEval metadata, splits, and the inverse (text to metadata)
render    scenes that satisfy a prompt, drawn at 64x64 pixels
detector  the rule-based detector and colour classifier
reward    GenEval's decision on top of them
"""
