"""Models: records of pure functions over plain nested dicts of parameters."""
