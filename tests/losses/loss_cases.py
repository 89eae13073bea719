"""Every loss of preferences as a case: how to draw its inputs, call it, and check it.

A case holds a loss, options that are not its defaults, and what its metrics are. The
oracle of a case is the function of its name in `loss_oracles` or `more_loss_oracles`,
one example at a time. The table goes on in `more_loss_cases.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import loss_oracles
import more_loss_oracles
from pref_jax import losses

BATCH, LIST = 8, 4
PAIRS_KEPT = np.array([True, False, True, True, False, True, True, False])
# All there; one dropped, two; one left, first or not; none; the first dropped.
ITEMS_KEPT = np.array(
    [
        [True, True, True, True],
        [True, True, False, True],
        [True, False, True, False],
        [False, True, False, False],
        [False, False, False, False],
        [False, True, True, True],
        [True, False, False, True],
        [True, False, False, False],
    ]
)


def s(x: float) -> float:
    """sigmoid(x), for arithmetic in tests."""
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log sigmoid(x), for arithmetic in tests."""
    return math.log(1 + math.exp(-x))


def assert_golden(name, first, options, loss, gradient):
    """A loss, and the gradient of its sum, are numbers that were worked out by hand."""
    options = {
        k: jnp.asarray(x) if isinstance(x, list) else x for k, x in options.items()
    }

    def total(first):
        value, _ = getattr(losses, name)(first, **options)
        return value.sum(), value

    found, value = jax.grad(total, has_aux=True)(jnp.asarray(first, jnp.float32))
    np.testing.assert_allclose(value, loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-7)


@dataclasses.dataclass(frozen=True)
class Input:
    """How to draw an input; `of_responses`: it has the axis K, and not only [...]."""

    draw: Callable
    of_responses: bool = True


def uniform(low, high, **kwargs):
    return Input(lambda rng, shape: rng.uniform(low, high, shape), **kwargs)


def ranks(rng, shape):
    """Ranks from 1, with ties."""
    return rng.integers(1, 4, shape).astype(float)


REWARDS = uniform(-3, 3)
LOGPS = uniform(-9, -0.5)
LENGTHS = Input(lambda rng, shape: rng.integers(1, 9, shape).astype(float))
GRADES = uniform(0, 4)
SHARES = uniform(0.1, 1)
FLAGS = Input(lambda rng, shape: rng.random(shape) < 0.5)
MARGINS = uniform(-1, 2, of_responses=False)
RESPONSE_REWARDS = uniform(-3, 3, of_responses=False)
RESPONSE_FLAGS = Input(lambda rng, shape: rng.random(shape) < 0.5, of_responses=False)
STATISTIC = uniform(0, 1, of_responses=False)


def as_the_oracle_has_it(option):
    """An option, or the oracle's name of a divergence: that of the constant."""
    if not isinstance(option, losses.Divergence):
        return option
    return next(k.lower() for k, x in vars(losses).items() if x is option)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss and all that the tests of every loss need to know of it.

    Attributes:
      name: of the loss, in `pref_jax.losses` and in `loss_oracles`.
      inputs: by argument; the first is positional and is the one to differentiate.
      options: the other arguments.
      metrics: (inputs of one example, where of its items) -> {name: number}.
      kind: "pair", "list" (`where` drops items) or "response" (no axis K).
      of_batch: whether it looks across the batch; then the oracle takes all of it.
      differences: whether it sees the first input through differences alone.
      stopped: whether a factor depends on the first input and carries no gradient.
      oracle: in place of the function of its name.
    """

    name: str
    inputs: dict[str, Input]
    options: dict
    metrics: Callable
    kind: str = "pair"
    of_batch: bool = False
    differences: bool = True
    stopped: bool = False
    oracle: Callable | None = None

    @property
    def first(self) -> str:
        """The name of the array that is differentiated."""
        return next(iter(self.inputs))

    @property
    def id(self) -> str:
        """For the names of tests."""
        options = [
            f"{k}={as_the_oracle_has_it(v)}"
            for k, v in self.options.items()
            if k in ("label_smoothing", "divergence", "dual_clip")
        ]
        arrays = ["margin"] if "margin" in self.inputs else []
        return "-".join([self.name, *options, *arrays])

    def call(self, arrays, where=None):
        """(loss, metrics) of the library."""
        function = getattr(losses, self.name)
        others = {k: x for k, x in arrays.items() if k != self.first}
        return function(arrays[self.first], **others, **self.options, where=where)

    def draw(self, seed, leading=(BATCH,), num_responses=None) -> dict:
        """Random inputs in float64 whose values are those of float32."""
        rng = np.random.default_rng(seed)
        num_responses = num_responses or (LIST if self.kind == "list" else 2)
        arrays = {}
        for name, given in self.inputs.items():
            shape = (*leading, num_responses) if given.of_responses else leading
            values = np.asarray(given.draw(rng, shape))
            if values.dtype != bool:
                values = values.astype(np.float32).astype(np.float64)
            arrays[name] = values
        return arrays

    @property
    def kept(self) -> np.ndarray:
        """`where` for a batch of `BATCH`, some of it dropped."""
        return ITEMS_KEPT if self.kind == "list" else PAIRS_KEPT

    def expected_loss(self, arrays, where=None) -> np.ndarray:
        """The loss by the oracle, in float64."""
        home = loss_oracles if hasattr(loss_oracles, self.name) else more_loss_oracles
        oracle = self.oracle or getattr(home, self.name)
        options = {k: as_the_oracle_has_it(x) for k, x in self.options.items()}

        def run(values, **more):
            others = {k: x for k, x in values.items() if k != self.first}
            return oracle(values[self.first], **others, **options, **more)

        values = {name: np.asarray(x).tolist() for name, x in arrays.items()}
        if self.of_batch:
            return np.array(run(values, where=where))
        leading = np.shape(arrays[self.first])
        leading = leading if self.kind == "response" else leading[:-1]
        out = np.zeros(leading)
        for index in np.ndindex(leading):
            one = {k: np.asarray(x)[index].tolist() for k, x in arrays.items()}
            if self.kind == "list":
                kept = None if where is None else where[index].tolist()
                out[index] = run(one, where=kept)
            elif where is None or where[index]:
                out[index] = run(one)
        return out

    def expected_metrics(self, arrays, where=None) -> dict:
        """The metrics by the oracles, 0 for what is dropped whole."""
        leading = np.shape(arrays[self.first])
        leading = leading if self.kind == "response" else leading[:-1]
        out = {}
        options = {k: as_the_oracle_has_it(x) for k, x in self.options.items()}
        for index in np.ndindex(leading):
            one = {k: np.asarray(x)[index].tolist() for k, x in arrays.items()}
            kept = True if where is None else where[index]
            found = self.metrics(one | options, kept)
            for name, value in found.items():
                out.setdefault(name, np.zeros(leading))
                out[name][index] = value if np.any(kept) else 0.0
        return out


# --- what the metrics are -------------------------------------------------------------


def of_pair(rewards):
    """The metrics of a pair, whose rewards are a function of the inputs."""

    def metrics(x, kept):
        del kept
        chosen, rejected = rewards(x)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": loss_oracles.pair_accuracy([chosen, rejected]),
        }

    return metrics


def with_terms(metrics, terms):
    return lambda x, kept: metrics(x, kept) | terms(x)


def both(function):
    """[w, l] of a function of (inputs, slot)."""
    return lambda x: [function(x, k) for k in range(2)]


AS_GIVEN = of_pair(lambda x: x["rewards"])
SCALED = of_pair(both(lambda x, k: x["beta"] * x["log_ratios"][k]))
IMPLICIT = of_pair(
    both(lambda x, k: x["beta"] * (x["logps"][k] - x["anchor_logps"][k]))
)
IMPLICIT_PER_TOKEN = of_pair(
    both(
        lambda x, k: (
            x["beta"] * (x["logps"][k] - x["anchor_logps"][k]) / x["lengths"][k]
        )
    )
)
LIKELIHOOD = of_pair(both(lambda x, k: x["beta"] * x["logps"][k]))
LIKELIHOOD_PER_TOKEN = of_pair(
    both(lambda x, k: x["beta"] * x["logps"][k] / x["lengths"][k])
)


def _log_odds(x, k):
    p = np.exp(x["logps"][k] / x["lengths"][k])
    return np.log(p / (1 - p))


ODDS = of_pair(both(_log_odds))


def preference(x, smoothing=0.0):
    return loss_oracles.dpo_loss(
        x["logps"],
        anchor_logps=x["anchor_logps"],
        beta=x["beta"],
        label_smoothing=smoothing,
    )


def of_response(against):
    """The metrics of a response, which is held against a statistic."""

    def metrics(x, kept):
        del kept
        return {
            "rewards/response": x["rewards"],
            "rewards/accuracy": loss_oracles.unpaired_accuracy(
                x["rewards"], desirable=x["desirable"], against=x[against]
            ),
        }

    return metrics


def _items(kept, values):
    return [
        v for v, k in zip(values, np.broadcast_to(kept, len(values)), strict=True) if k
    ]


def of_list(order):
    """The metrics of a list, whose items are ordered by a function of the inputs."""

    def metrics(x, kept):
        rewards = x["rewards"] if "rewards" in x else _log_ratios(x)
        targets, rewards = _items(kept, order(x)), _items(kept, rewards)
        return {
            "rewards/accuracy": loss_oracles.list_accuracy(rewards, targets=targets)
        }

    return metrics


def _log_ratios(x):
    pairs = zip(x["logps"], x["anchor_logps"], strict=True)
    return [x["beta"] * (p - a) for p, a in pairs]


def of_targets(targets):
    """The metrics of a list that is fitted to a distribution."""
    accuracy = of_list(targets)

    def metrics(x, kept):
        rewards = x["rewards"] if "rewards" in x else _log_ratios(x)
        q, rewards = _items(kept, targets(x)), _items(kept, rewards)
        return accuracy(x, kept) | {
            "targets/kl": loss_oracles.targets_kl(rewards, targets=q),
            "targets/entropy": loss_oracles.targets_entropy(q),
        }

    return metrics


def sdpo_metrics(x, kept):
    """Without the chosen response nothing is left of the list."""
    kept = np.broadcast_to(kept, len(x["rewards"]))
    if not kept[0]:
        return {"rewards/accuracy": 0.0}
    first = [1.0] + [0.0] * (len(kept) - 1)
    return of_list(lambda x: first)(x, kept)


# --- the table ------------------------------------------------------------------------


def pair(name, inputs, metrics=AS_GIVEN, *, differences=True, **options):
    return Case(name, inputs, options, metrics, differences=differences)


def of_items(name, inputs, metrics, **options):
    return Case(name, inputs, options, metrics, kind="list")


ANCHORED = {"logps": LOGPS, "anchor_logps": LOGPS}

CASES = [
    pair("logistic_loss", {"rewards": REWARDS}),
    pair("logistic_loss", {"rewards": REWARDS, "margin": MARGINS}, label_smoothing=0.2),
    pair("dpo_loss", ANCHORED, IMPLICIT, beta=0.5),
    pair("dpo_loss", ANCHORED, IMPLICIT, beta=0.3, label_smoothing=0.1),
    pair("robust_loss", {"rewards": REWARDS}, flip_rate=0.2),
    pair("ipo_loss", {"log_ratios": REWARDS}, SCALED, beta=0.4),
    pair("hinge_loss", {"rewards": REWARDS}, margin=0.7),
    pair("thresholded_loss", {"rewards": REWARDS}, threshold=-0.6),
    pair(
        "length_regularized_loss",
        {"rewards": REWARDS, "lengths": LENGTHS},
        alpha=0.3,
    ),
    pair(
        "rpo_loss",
        ANCHORED | {"lengths": LENGTHS},
        with_terms(
            IMPLICIT,
            lambda x: {
                "loss/preference": preference(x),
                "loss/nll": -x["logps"][0] / x["lengths"][0],
            },
        ),
        differences=False,
        beta=0.5,
        alpha=0.7,
    ),
    pair("reward_aware_loss", {"rewards": REWARDS, "grades": GRADES}, eta=0.6),
    pair("nca_loss", {"rewards": REWARDS}, differences=False),
    pair("apo_zero_loss", {"rewards": REWARDS}, differences=False),
    pair("apo_down_loss", {"rewards": REWARDS}, differences=False),
    pair("exo_loss", {"rewards": REWARDS}, label_smoothing=0.1),
    pair(
        "sppo_loss",
        {"log_ratios": REWARDS, "win_rates": uniform(0, 1)},
        SCALED,
        differences=False,
        beta=0.4,
    ),
    pair("discopop_loss", {"rewards": REWARDS}, tau=0.3),
    pair(
        "length_normalized_dpo_loss",
        ANCHORED | {"lengths": LENGTHS},
        IMPLICIT_PER_TOKEN,
        differences=False,
        beta=0.8,
        label_smoothing=0.15,
    ),
    pair(
        "xpo_loss",
        ANCHORED | {"explore": FLAGS},
        with_terms(
            IMPLICIT,
            lambda x: {
                "loss/preference": preference(x),
                "loss/bonus": loss_oracles.xpo_bonus(x["logps"], explore=x["explore"]),
            },
        ),
        differences=False,
        beta=0.5,
        alpha=0.2,
    ),
    pair(
        "simpo_loss",
        {"logps": LOGPS, "lengths": LENGTHS},
        LIKELIHOOD_PER_TOKEN,
        differences=False,
        beta=1.5,
        gamma=0.4,
        label_smoothing=0.1,
    ),
    pair(
        "orpo_loss",
        {"logps": LOGPS, "lengths": LENGTHS},
        with_terms(
            ODDS,
            lambda x: {
                "loss/nll": -x["logps"][0] / x["lengths"][0],
                "loss/odds_ratio": loss_oracles.orpo_odds_ratio(
                    x["logps"], lengths=x["lengths"]
                ),
            },
        ),
        differences=False,
        lambda_=0.3,
    ),
    pair(
        "cpo_loss",
        {"logps": LOGPS},
        with_terms(
            LIKELIHOOD,
            lambda x: {
                "loss/preference": loss_oracles.logistic_loss(
                    [x["beta"] * p for p in x["logps"]], label_smoothing=0.1
                ),
                "loss/nll": -x["logps"][0],
            },
        ),
        differences=False,
        beta=0.3,
        alpha=0.6,
        label_smoothing=0.1,
    ),
    Case(
        "kto_loss",
        {
            "rewards": RESPONSE_REWARDS,
            "desirable": RESPONSE_FLAGS,
            "kl": STATISTIC,
        },
        {"desirable_weight": 1.4, "undesirable_weight": 0.6},
        of_response("kl"),
        kind="response",
        differences=False,
    ),
    Case(
        "bco_loss",
        {
            "rewards": RESPONSE_REWARDS,
            "desirable": RESPONSE_FLAGS,
            "delta": STATISTIC,
        },
        {},
        of_response("delta"),
        kind="response",
        differences=False,
    ),
    Case(
        "aot_loss",
        ANCHORED,
        {"beta": 0.5, "label_smoothing": 0.1},
        IMPLICIT,
        of_batch=True,
    ),
    Case(
        "aot_unpaired_loss",
        {"rewards": REWARDS},
        {"label_smoothing": 0.1},
        AS_GIVEN,
        of_batch=True,
        differences=False,
    ),
    of_items(
        "listwise_cross_entropy",
        {"rewards": REWARDS, "targets": SHARES},
        of_targets(lambda x: x["targets"]),
    ),
    of_items(
        "adpo_loss",
        ANCHORED | {"targets": SHARES},
        of_targets(lambda x: x["targets"]),
        beta=0.5,
    ),
    of_items(
        "plackett_luce_loss",
        {"rewards": REWARDS, "ranks": Input(ranks)},
        of_list(lambda x: [-r for r in x["ranks"]]),
    ),
    of_items(
        "irpo_loss",
        {"rewards": REWARDS, "weights": GRADES},
        of_list(lambda x: x["weights"]),
    ),
    of_items(
        "irpo_mean_loss",
        {"rewards": REWARDS, "weights": GRADES},
        of_list(lambda x: x["weights"]),
    ),
    of_items("sdpo_loss", {"rewards": REWARDS}, sdpo_metrics),
    of_items(
        "lipo_lambda_loss",
        {"rewards": REWARDS, "labels": GRADES},
        of_list(lambda x: x["labels"]),
    ),
    of_items(
        "listnet_loss",
        {"rewards": REWARDS, "labels": GRADES},
        of_targets(lambda x: loss_oracles.softmax(x["labels"], temperature=1.0)),
    ),
]
