"""Chats in pairs: text, numbers, and sequences of dicts."""

import numpy as np
import tensorflow_datasets as tfds

NUM_ROWS = {"train": 5, "test": 2}


def row(number: int) -> dict:
    """A row as its author thinks of it."""
    return {
        "prompt": [
            {"role": "system", "content": "Sei kürz."},
            {"role": "user", "content": f"Was ist {number} + 1?"},
        ],
        "chosen": [{"role": "assistant", "content": f"{number + 1}"}],
        "rejected": [{"role": "assistant", "content": f"{number}"}],
        "tools": [{"type": "function", "function": {"name": "sum", "strict": True}}],
        "margin": number / 2,
        "number": number,
        "topic": "Zählen",
        "is_easy": number < 3,
        "tags": ["a", "b"],
    }


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Reads nothing and downloads nothing."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text, scalar = tfds.features.Text(), tfds.features.Scalar
        messages = tfds.features.Sequence({"role": text, "content": text})
        function = {"name": text, "strict": scalar(dtype=np.bool_)}
        tools = tfds.features.Sequence({"type": text, "function": function})
        features = {
            "prompt": messages,
            "chosen": messages,
            "rejected": messages,
            "tools": tools,
            "margin": scalar(dtype=np.float32),
            "number": scalar(dtype=np.int64),
            "topic": text,
            "is_easy": scalar(dtype=np.bool_),
            "tags": tfds.features.Sequence(text),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(n) for split, n in NUM_ROWS.items()}

    def _generate_examples(self, num_rows):
        for number in range(num_rows):
            yield number, row(number)
