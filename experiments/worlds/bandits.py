r"""Contextual bandits with a known truth, and twelve ways to spoil what is learnt from.

Why: whether a loss bears noise is a question about the true reward, which only a world
of our own can show. Everything here is a function of a random key, so that all seeds of
all scenarios train in one compiled program.

The world. A context x and K items f_i are normal vectors; the true reward of an item is

    r_i = 1.5 x^T A f_i / sqrt(D) + tanh(f_i . b / sqrt(D))

with a matrix A and a vector b drawn anew for every seed. A policy is a small network of
context and item, and its log-probabilities are the log-softmax of what the network says
of the K items. It learns from labels, which are rewards that `Noise` has spoilt, and is
measured on clean rewards of fresh contexts.

    gaussian      r + s N(0, 1), and now and then an outlier of 10 s N(0, 1)
    shift         the test contexts have another mean; labels have Gaussian noise
    adversarial   the labels of a whole list are negated now and then
    cauchy        r + c Cauchy

The reference is a policy after a few updates on clean labels.

Source: the four kinds at three severities are those of ADPO, arXiv:2510.18913; its
parameters and its sizes are not published (or not verified), and all numbers are ours.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from pref_jax import anchors, targets
from pref_jax.losses.listwise import listwise_cross_entropy
from pref_jax.method import Method
from pref_jax.rewards import sequence_reward
from pref_jax.train.state import TrainState, init_state
from pref_jax.train.step import make_train_step
from pref_jax.types import PyTree, Scores


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes of the world and of the network; all ours but `hidden`."""

    size: int = 16  # D, of a context and of an item
    num_items: int = 8  # K
    num_train: int = 2000  # contexts with spoilt labels
    num_validation: int = 1000  # clean contexts that settings are chosen on
    num_test: int = 2000  # clean contexts that are reported
    num_reference: int = 512  # clean contexts that the reference learns from
    hidden: int = 64  # of both hidden layers; the paper has 64, 128 and 256
    groups_per_step: int = 128  # contexts of a batch
    reference_steps: int = 30  # the paper's
    reference_sharpness: float = 3.0  # its targets are softmax(sharpness r)
    learning_rate: float = 5e-4  # of AdamW, the paper's; of the reference too
    weight_decay: float = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """How labels are spoilt, and how far the test contexts lie from the others.

    A pytree of numbers: scenarios are stacked and mapped over.
    """

    gaussian: jax.Array | float = 0.0  # deviation
    outlier_rate: jax.Array | float = 0.0  # share of items
    outlier_scale: jax.Array | float = 0.0  # deviation of what is added to them
    flip_rate: jax.Array | float = 0.0  # share of lists that are negated
    cauchy: jax.Array | float = 0.0  # scale
    shift: jax.Array | float = 0.0  # norm of the mean of the test contexts


def _outliers(scale: float, rate: float) -> Noise:
    return Noise(gaussian=scale, outlier_rate=rate, outlier_scale=10 * scale)


SCENARIOS = {
    "gaussian, light": _outliers(0.5, 0.05),
    "gaussian, medium": _outliers(1.0, 0.1),
    "gaussian, heavy": _outliers(2.0, 0.2),
    "shift, light": Noise(gaussian=0.5, shift=0.5),
    "shift, medium": Noise(gaussian=0.5, shift=1.0),
    "shift, heavy": Noise(gaussian=0.5, shift=2.0),
    "adversarial, light": Noise(gaussian=0.3, flip_rate=0.1),
    "adversarial, medium": Noise(gaussian=0.3, flip_rate=0.2),
    "adversarial, heavy": Noise(gaussian=0.3, flip_rate=0.35),
    "cauchy, light": Noise(cauchy=0.2),
    "cauchy, medium": Noise(cauchy=0.5),
    "cauchy, heavy": Noise(cauchy=1.0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truth:
    """What the reward of an item is."""

    matrix: jax.Array  # f32[D, D]
    vector: jax.Array  # f32[D]

    def rewards(self, context, items):
        """Clean rewards of contexts [B, D] and items [B, K, D]: f32[B, K]."""
        root = context.shape[-1] ** 0.5
        match = jnp.einsum("bd,de,bke->bk", context, self.matrix, items)
        return 1.5 * match / root + jnp.tanh(items @ self.vector / root)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BanditBatch:
    """Contexts, their items, and what is known of these.

    What a train step and a `Method` ask of a batch: each item is a response of one
    token.

    Attributes:
      context: f32[B, D].
      items: f32[B, K, D].
      labels: f32[B, K], rewards, spoilt or clean.
      pairs: i32[B, M, 2], the pairs of items that a method on pairs may look at.
      valid: bool[B, K].
      loss_mask: bool[B, K, 1].
      record: i32[B].
      extras: empty.
    """

    context: jax.Array
    items: jax.Array
    labels: jax.Array
    pairs: jax.Array
    valid: jax.Array
    loss_mask: jax.Array
    record: jax.Array
    extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """The truth of a seed, and its four sets; only `train` is spoilt.

    `one_pair` is i32[N, 1, 2]: of each training context the pair that a method sees
    which is shown one; the batches have all pairs.
    """

    truth: Truth
    one_pair: jax.Array
    reference: BanditBatch
    train: BanditBatch
    validation: BanditBatch
    test: BanditBatch


def all_pairs(num_items: int):
    """Every pair of items once: i32[M, 2]."""
    return jnp.stack(jnp.triu_indices(num_items, k=1), axis=-1)


def make_batch(context, items, labels, pairs) -> BanditBatch:
    """A batch in which every item is there.

    Args:
      context: f32[B, D].
      items: f32[B, K, D].
      labels: f32[B, K].
      pairs: i32[B, M, 2], or i32[M, 2]: the same for every context.
    """
    num, num_items = labels.shape
    return BanditBatch(
        context=context,
        items=items,
        labels=labels,
        pairs=jnp.broadcast_to(pairs, (num, *pairs.shape[-2:])),
        valid=jnp.ones((num, num_items), bool),
        loss_mask=jnp.ones((num, num_items, 1), bool),
        record=jnp.arange(num),
    )


def draw_truth(key, size: int) -> Truth:
    """The matrix has entries of variance 1 / D."""
    first, second = jax.random.split(key)
    matrix = jax.random.normal(first, (size, size)) / size**0.5
    return Truth(matrix=matrix, vector=jax.random.normal(second, (size,)))


def draw_contexts(key, num: int, size: int, num_items: int, shift=0.0):
    """(context f32[B, D], items f32[B, K, D]); `shift` is the norm of x's mean."""
    first, second, third = jax.random.split(key, 3)
    direction = jax.random.normal(third, (size,))
    direction = direction / jnp.linalg.norm(direction)
    context = jax.random.normal(first, (num, size)) + (shift * direction)[None]
    return context, jax.random.normal(second, (num, num_items, size))


def spoil(key, rewards, noise: Noise):
    """The labels that are seen of these rewards: f32[B, K]."""
    keys = jax.random.split(key, 5)
    shape = rewards.shape
    flipped = jax.random.uniform(keys[0], (shape[0], 1)) < noise.flip_rate
    labels = jnp.where(flipped, -rewards, rewards)
    labels += noise.gaussian * jax.random.normal(keys[1], shape)
    is_outlier = jax.random.uniform(keys[2], shape) < noise.outlier_rate
    outlier = noise.outlier_scale * jax.random.normal(keys[3], shape)
    labels += jnp.where(is_outlier, outlier, 0.0)
    return labels + noise.cauchy * jax.random.cauchy(keys[4], shape)


def draw_data(key, world: World, noise: Noise) -> Data:
    """The sets of a seed: the same for every method, whatever it looks at.

    Args:
      key: of the seed.
      world: sizes.
      noise: of the scenario.
    """
    keys = jax.random.split(key, 7)
    truth = draw_truth(keys[0], world.size)
    pairs = all_pairs(world.num_items)

    def clean(key, num, shift=0.0):
        context, items = draw_contexts(key, num, world.size, world.num_items, shift)
        return make_batch(context, items, truth.rewards(context, items), pairs)

    train = clean(keys[1], world.num_train)
    labels = spoil(keys[2], train.labels, noise)
    picked = jax.random.randint(keys[3], (world.num_train, 1), 0, len(pairs))
    return Data(
        truth=truth,
        one_pair=pairs[picked],
        reference=clean(keys[4], world.num_reference),
        train=dataclasses.replace(train, labels=labels),
        validation=clean(keys[5], world.num_validation),
        test=clean(keys[6], world.num_test, noise.shift),
    )


# --- the policy -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Policy:
    """A network of two hidden layers on context and item, one number an item."""

    size: int  # D
    hidden: int

    def init(self, key) -> PyTree:
        """Parameters: He's initialisation, and a small last layer."""
        keys = jax.random.split(key, 4)
        scale, hidden = (1 / self.size) ** 0.5, self.hidden
        return {
            "context": scale * jax.random.normal(keys[0], (self.size, hidden)),
            "item": scale * jax.random.normal(keys[1], (self.size, hidden)),
            "bias": jnp.zeros(hidden),
            "second": (2 / hidden) ** 0.5
            * jax.random.normal(keys[2], (hidden, hidden)),
            "second_bias": jnp.zeros(hidden),
            "last": 0.1 * hidden**-0.5 * jax.random.normal(keys[3], (hidden,)),
        }

    def logps(self, params, context, items):
        """Log-probability of every item: f32[B, K], nats."""
        first = (context @ params["context"] + params["bias"][None])[:, None]
        state = jax.nn.relu(first + items @ params["item"])
        bias = params["second_bias"][None, None]
        state = jax.nn.relu(state @ params["second"] + bias)
        return jax.nn.log_softmax(state @ params["last"])


def score(model: Policy, params, batch: BanditBatch) -> Scores:
    """The `score` of a method on bandits: an item is a response of one token."""
    return Scores(logp=model.logps(params, batch.context, batch.items)[..., None])


def measure(logps, anchor_logps, rewards) -> dict[str, jax.Array]:
    """Means over contexts, of log-probabilities and clean rewards f32[B, K].

    Returns:
      `win_mass`, the probability of the best item; `accuracy`, how often it is the most
      probable; `reward`, expected; `kl`, KL(policy || anchor) in nats.
    """
    probability = jnp.exp(logps)
    best = rewards == rewards.max(-1, keepdims=True)
    return {
        "win_mass": jnp.where(best, probability, 0.0).sum(-1).mean(),
        "accuracy": jnp.take_along_axis(best, logps.argmax(-1)[:, None], 1).mean(),
        "reward": (probability * rewards).sum(-1).mean(),
        "kl": (probability * (logps - anchor_logps)).sum(-1).mean(),
    }


# --- training -------------------------------------------------------------------------


def _batches(key, num_records: int, groups_per_step: int, num_steps: int):
    """Records of every step, an epoch after the other, each shuffled: i32[steps, B]."""
    num_epochs = -(-num_steps * groups_per_step // num_records)
    keys = jax.random.split(key, num_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, num_records))(keys)
    needed = num_steps * groups_per_step
    return order.reshape(-1)[:needed].reshape(num_steps, groups_per_step)


def make_optimizer(world: World, learning_rate) -> optax.GradientTransformation:
    """AdamW at a constant rate, which may be traced."""
    return optax.adamw(learning_rate, weight_decay=world.weight_decay)


def train(
    method: Method,
    model: Policy,
    params: PyTree,
    data: BanditBatch,
    *,
    key,
    groups_per_step: int,
    num_steps: int,
    optimizer: optax.GradientTransformation,
    anchor: PyTree = None,
) -> TrainState:
    """All steps of a method.

    Pure: to be mapped over seeds, scenarios and settings, and compiled whole.

    Args:
      method: the five functions; its anchor may be refreshed.
      model: the network.
      params: to start from.
      data: the training set.
      key: of the order of the data.
      groups_per_step: contexts of a batch.
      num_steps: updates.
      optimizer: an optax transformation.
      anchor: parameters of the anchor; None: those that it starts from.
    """
    step = make_train_step(method, model, optimizer)
    anchor = params if anchor is None else anchor
    state = init_state(params, optimizer, rng=key, anchor=anchor)
    order = _batches(key, len(data.labels), groups_per_step, num_steps)

    def one(state, numbers):
        batch = jax.tree.map(lambda leaf: leaf[numbers], data)
        state, outputs = step(state, batch)
        return state, outputs["metrics"]["loss"]

    return jax.lax.scan(one, state, order)[0]


def make_list_method(name: str, anchor, *, beta, make_targets) -> Method:
    """Anchored cross-entropy of a whole list.

    Args:
      name: of the method.
      anchor: of `pref_jax.anchors`, with this module's `score`.
      beta: reward per nat.
      make_targets: labels f32[B, K] -> distribution f32[B, K].
    """

    def loss(rewards, scores, batch):
        del scores
        values, metrics = listwise_cross_entropy(
            rewards, targets=make_targets(batch.labels)
        )
        ones = jnp.ones_like(values)
        return values, {key: (value, ones) for key, value in metrics.items()}

    def reward(scores, anchor_scores, batch):
        return sequence_reward(scores, anchor_scores, batch, beta=beta)

    return Method(name=name, anchor=anchor, reward=reward, loss=loss, score=score)


def train_reference(key, world: World, model: Policy, data: BanditBatch, num_steps):
    """The policy that all methods start from: a few updates on clean labels."""
    first, second = jax.random.split(key)
    temperature = 1 / world.reference_sharpness
    method = make_list_method(
        "reference",
        anchors.none(),
        beta=1.0,
        make_targets=lambda labels: targets.softmax(labels, temperature=temperature),
    )
    return train(
        method,
        model,
        model.init(first),
        data,
        key=second,
        groups_per_step=world.groups_per_step,
        num_steps=num_steps,
        optimizer=make_optimizer(world, world.learning_rate),
    ).params
