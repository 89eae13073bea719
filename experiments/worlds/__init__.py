"""Controlled worlds with a known truth, shared by the experiments."""
