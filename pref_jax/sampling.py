"""A jitted sampler with a key-value cache that holds each prompt once for K samples.

The cache is laid out as the rows are: the prompt without its last token is shared, and
each sample is a branch that begins with that last token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax.axes import constrain, gather_all, whole
from pref_jax.loops import while_at_most
from pref_jax.numerics import soft_cap
from pref_jax.types import Model


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn."""

    num_samples: int = 1  # K, responses to each prompt
    max_new_tokens: int = 64  # S, the end token included
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # keep the k likeliest tokens; None: all
    top_p: float = 1.0  # keep the likeliest tokens that hold this much probability

    def __post_init__(self):
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"`num_samples` and `max_new_tokens` must be at least 1; got {self}."
            )
        if self.temperature < 0:
            raise ValueError(
                f"`temperature` must not be negative (0 is greedy); got "
                f"{self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be None or at least 1; got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1]; got {self.top_p}.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ValueError(
                "`top_k` and `top_p` have no effect on greedy sampling; leave them out "
                "or use a temperature above 0."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """Drawn responses.

    Attributes:
      tokens: i32[B, K, S]; 0 after the end.
      length: i32[B, K]. Tokens of the response, its end token included.
      ended: bool[B, K]. False: cut off at S tokens without an end token.
      logps: f32[B, K, S]. The model's own, at temperature 1 and over the whole
        vocabulary; 0 after the end.
      behaviour_logps: f32[B, K, S]. Of the distribution that was drawn from.
    """

    tokens: jax.Array
    length: jax.Array
    ended: jax.Array
    logps: jax.Array
    behaviour_logps: jax.Array


def filter_logits(logits, *, temperature: float, top_k: int | None, top_p: float):
    """The logits that are drawn from: scaled, then cut to the likeliest tokens.

    Args:
      logits: f32[..., V].
      temperature: positive.
      top_k: tokens that stay, or None. Ties with the k-th stay too.
      top_p: the smallest set of likeliest tokens whose probability reaches this stays;
        the likeliest always does.

    Returns:
      f32[..., V], -inf where a token cannot be drawn.

    >>> filter_logits(jnp.array([2.0, 1.0, 0.0]), temperature=1.0, top_k=2, top_p=1.0)
    Array([  2.,   1., -inf], dtype=float32)
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays while those before it have not reached top_p.
        stays = jnp.cumsum(probability, axis=-1) - probability < top_p
        lowest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def make_sampler(
    model: Model, config: SamplingConfig, *, end_ids: Sequence[int]
) -> Sampler:
    """A compiled sampler of a model.

    Args:
      model: a `pref_jax.types.Model`.
      config: how to draw.
      end_ids: tokens that end a response; none: responses have full length.

    Returns:
      (params, prompts i32[B, P], length i32[B], keys key[B]) -> Samples. On a mesh
      the prompts are split over its devices, every process gets all samples, and a
      device holds the parameters whole over fsdp while it samples. Prompts are
      padded on the right with any id. A prompt's draws depend on its own key alone, not
      on the other prompts of the batch.
    """
    ends = jnp.asarray(tuple(end_ids), jnp.int32)
    greedy = config.temperature == 0

    def draw(logits, keys, step):
        """Tokens [B, K] and the log-probability they were drawn with."""
        if greedy:
            tokens = logits.argmax(-1)
            return tokens, jnp.zeros(tokens.shape, jnp.float32)
        logits = filter_logits(
            logits,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        tokens = jax.vmap(_draw)(keys, logits)
        return tokens, _logps(logits, tokens)

    def sample(params, prompts, length, keys):
        # Once, not once a token.
        params = gather_all(params, model.param_axes(params))
        prompts, length = constrain(prompts, "rows", None), constrain(length, "rows")
        num_prompts, num_samples = prompts.shape[0], config.num_samples
        shape = (num_prompts, num_samples, config.max_new_tokens)
        kept = length - 1  # the last prompt token opens the branches
        cache = model.init_cache(num_prompts, prompts.shape[1], *shape[1:])
        cache = model.prefill(params, prompts, kept, cache)
        matrix = model.unembedding(params)
        last = jnp.take_along_axis(prompts, kept[:, None], axis=1)
        samples = Samples(
            tokens=jnp.zeros(shape, jnp.int32),
            length=jnp.zeros(shape[:2], jnp.int32),
            ended=jnp.zeros(shape[:2], bool),
            logps=jnp.zeros(shape, jnp.float32),
            behaviour_logps=jnp.zeros(shape, jnp.float32),
        )

        def unfinished(carry):
            step, _, _, samples = carry
            return (step < config.max_new_tokens) & ~samples.ended.all()

        def one_token(carry):
            step, tokens, cache, samples = carry
            hidden, cache = model.decode(params, tokens, kept, step, cache)
            logits = jnp.einsum(
                "bkd,vd->bkv",
                hidden,
                matrix.astype(hidden.dtype),
                preferred_element_type=jnp.float32,
            )
            logits = soft_cap(logits, model.logit_softcap)
            tokens, behaviour = draw(logits, keys, step)
            logps = _logps(logits, tokens)
            live = ~samples.ended

            def put(into, values):
                return into.at[:, :, step].set(jnp.where(live, values, 0))

            samples = Samples(
                tokens=put(samples.tokens, tokens.astype(jnp.int32)),
                length=samples.length + live,
                ended=samples.ended | jnp.isin(tokens, ends),
                logps=put(samples.logps, logps),
                behaviour_logps=put(samples.behaviour_logps, behaviour),
            )
            return step + 1, tokens.astype(jnp.int32), cache, samples

        first = jnp.broadcast_to(last, shape[:2])
        carry = (jnp.zeros((), jnp.int32), first, cache, samples)
        return whole(
            while_at_most(config.max_new_tokens, unfinished, one_token, carry)[-1]
        )

    longest = model.max_positions
    return Sampler(
        jax.jit(sample), None if longest is None else longest - config.max_new_tokens
    )


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A compiled sampler, and what it can take.

    Attributes:
      draw: (params, prompts i32[B, P], length i32[B], keys key[B]) -> Samples.
      longest_prompt: tokens of a prompt that leave room for a whole response in what
        the model is made for; None: any number.
    """

    draw: Callable[..., Samples]
    longest_prompt: int | None

    def __call__(self, params, prompts, length, keys) -> Samples:
        """`draw`; lengths, which may be traced, are not checked."""
        return self.draw(params, prompts, length, keys)


def _blocks(logits):
    """f32[..., V] as about sqrt(V) blocks, the last one filled up with -inf."""
    size = 2 ** math.ceil(math.log2(logits.shape[-1]) / 2)
    rest = [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % size)]
    padded = jnp.pad(logits, rest, constant_values=-jnp.inf)
    return padded.reshape(*logits.shape[:-1], -1, size)


def _draw(key, logits):
    """i32[K]: a token of each softmax(logits f32[K, V]).

    A block of the vocabulary is drawn, then one of its tokens: that takes about
    2 sqrt(V) random numbers, where Gumbel noise on all logits takes V.
    """
    of_block, of_token = jax.random.split(key)
    blocks = _blocks(logits)
    block = jax.random.categorical(of_block, jax.nn.logsumexp(blocks, axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * blocks.shape[-1] + jax.random.categorical(of_token, inside)


def _logps(logits, tokens):
    """f32[B, K]: log_softmax(logits f32[B, K, V]) of the tokens alone."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def sample_responses(
    sampler: Sampler,
    params,
    prompts: Sequence[np.ndarray],
    *,
    key: jax.Array,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda num_done: None,
) -> Samples:
    """Sample for any number of prompts of any lengths, in batches of one shape.

    Args:
      sampler: of `make_sampler`.
      params: of the model.
      prompts: ids of each prompt, at least one token each.
      key: prompt i draws with `fold_in(key, i)`, whatever the batch size.
      batch_size: prompts at once.
      on_batch: told the number of prompts done after each batch.

    Returns:
      `Samples` of host arrays, in the order of the prompts.

    Raises:
      ValueError: there are no prompts, one is empty, or one leaves no room for a whole
        response.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise ValueError(
            f"sampling needs prompts of at least one token (a BOS will do); got "
            f"{len(lengths)} prompts, {int((lengths < 1).sum())} of them empty."
        )
    most = sampler.longest_prompt
    if most is not None and lengths.max() > most:
        raise ValueError(
            f"the model has room for prompts of {most} tokens before a whole response; "
            f"{int((lengths > most).sum())} of {len(lengths)} are longer, up to "
            f"{lengths.max()}. Leave them out, or draw fewer new tokens."
        )
    width = -(-lengths.max() // 8) * 8  # few widths, few compilations
    padded = np.zeros((len(prompts), width), np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt)] = prompt
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(
        jnp.arange(len(prompts))
    )
    results = []
    for first in range(0, len(prompts), batch_size):
        # The last batch is filled up with prompts of earlier ones, and cut again.
        index = np.arange(first, first + batch_size) % len(prompts)
        batch = sampler(params, padded[index], lengths[index], keys[index])
        results.append(jax.device_get(batch))
        on_batch(min(first + batch_size, len(prompts)))
    return jax.tree.map(
        lambda *leaves: np.concatenate(leaves)[: len(prompts)], *results
    )
