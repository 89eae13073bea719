"""Losses: arrays in, (loss, metrics) out; one function each, unreduced."""
