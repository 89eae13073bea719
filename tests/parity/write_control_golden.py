"""Writes golden/control.json: steps of Gymnasium's own tasks.

pip install gymnasium==1.3.0
python tests/parity/write_control_golden.py
"""

import json
import pathlib

import gymnasium
import numpy as np

TARGET = pathlib.Path(__file__).parents[1] / "golden" / "control.json"
NUM_STEPS = 60


def steps_of(name: str) -> list[dict]:
    """States, actions, and what the task says to each, until it is over."""
    env = gymnasium.make(name).unwrapped
    env.reset(seed=1)
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(NUM_STEPS):
        discrete = name.startswith("CartPole")
        action = int(rng.integers(2)) if discrete else rng.uniform(-3, 3, 1)
        before = np.asarray(env.state, float)
        observation, reward, over, _, _ = env.step(action)
        steps.append(
            {
                "state": before.tolist(),
                "action": np.asarray(action).tolist(),
                "next_observation": np.asarray(observation, float).tolist(),
                "reward": float(reward),
                "over": bool(over),
            }
        )
        if over:
            break
    return steps


def main() -> None:
    """Write the file, with the version that made it."""
    found = {name: steps_of(name) for name in ("CartPole-v1", "Pendulum-v1")}
    found["gymnasium"] = gymnasium.__version__
    TARGET.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
