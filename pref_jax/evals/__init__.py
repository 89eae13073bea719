"""Evaluations: per-prompt numbers -> means with intervals. Pure, NumPy only."""
