"""The tests of `test_golden_llama.py` on values that torch makes here and now.

Other weights and ids than the golden files hold, and each model with its responses
padded on either side.
"""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("torch")

from parity import write_golden  # noqa: E402
from test_golden_llama import (  # noqa: E402, F401  tests: they take the fixture below
    CASES,
    GOLDEN,
    Case,
    assert_close,
    assert_trees_close,
    test_dpo_loss_of_each_pair_is_torchs,
    test_hidden_states_after_each_layer_are_torchs,
    test_logits_are_torchs,
    test_one_sgd_step_is_torchs_in_gradient_and_parameters,
    test_token_logps_of_packed_rows_are_those_of_torchs_padded_ones,
)


@pytest.fixture(
    scope="module", params=itertools.product(CASES, ("left", "right")), ids="-".join
)
def case(request, tmp_path_factory):
    name, padding = request.param
    folder = tmp_path_factory.mktemp(name)
    write_golden.write_case(
        folder, write_golden.CASES[name], padding=padding, seed=1 + (padding == "left")
    )
    return Case(folder)


@pytest.mark.parametrize("name", CASES)
def test_the_script_still_writes_the_recorded_values(name, tmp_path):
    recorded = Case(GOLDEN / name)
    settings = write_golden.CASES[name]
    padding, seed = recorded.record["padding"], recorded.record["seed"]
    write_golden.write_case(tmp_path, settings, padding=padding, seed=seed)
    made = Case(tmp_path)
    assert made.config == recorded.config
    assert_trees_close(made.params, recorded.params)
    assert made.values.keys() == recorded.values.keys()
    for key, value in made.values.items():
        if value.dtype == np.float32:
            assert_close(value, recorded.values[key], key)
        else:
            np.testing.assert_array_equal(value, recorded.values[key])


def test_the_recorded_story_is_what_torch_says_of_it(shared_data):
    recorded = json.loads((GOLDEN / "stories260k.json").read_text())
    made = write_golden.story_values(shared_data("stories260k"))
    assert made["text"] == recorded["text"]
    assert made["ids"] == recorded["ids"]
    for key in ("token_logps", "mean_nll"):
        assert_close(made[key], recorded[key], key)
