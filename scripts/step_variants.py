"""Preference steps as the benchmark measures them: layouts, growth, share of the peak.

Lengths of a prompt and its responses are written (prompt, (response, ...)).
"""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pref_jax import anchors, rewards
from pref_jax.data import rows, sources
from pref_jax.logps import token_stats
from pref_jax.losses.listwise import plackett_luce_loss
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.method import Method, on_rewards
from pref_jax.models.decoder import DecoderConfig, make_decoder
from pref_jax.models.flops import FORMULA, forward_flops
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from pref_jax.types import TokenGroup
from step_profile import profile
from variants import Variant, measure

SMALL = DecoderConfig(
    vocab_size=50257,
    width=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    mlp_width=704,
)
"""Most of the work is the vocabulary's."""

DEEP = DecoderConfig(
    vocab_size=8192,
    width=512,
    num_layers=12,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    mlp_width=1408,
)
"""Most of the work is the layers'."""

_BETA = 0.1  # reward per nat


def random_group(rng, vocab_size, record, prompt, responses) -> TokenGroup:
    """A group of random ids with the logps of a uniform anchor."""
    draw = functools.partial(rng.integers, 1, vocab_size, dtype=np.int32)
    logps = tuple(np.full(n, -np.log(vocab_size), np.float32) for n in responses)
    return TokenGroup(
        prompt=draw(prompt),
        responses=tuple(draw(n) for n in responses),
        loss_masks=tuple(np.ones(n, bool) for n in responses),
        labels=(1.0,) + (0.0,) * (len(responses) - 1),
        record=record,
        extras={"anchor_logps": logps},
    )


def _ranking_loss(values, *, where):
    """Plackett-Luce, the responses from best to worst; the logistic loss of a pair."""
    if values.shape[-1] == 2:
        return logistic_loss(values, where=where)
    ranks = jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape)
    where = jnp.broadcast_to(where[:, None], values.shape)
    return plackett_luce_loss(values, ranks=ranks, where=where)


METHOD = Method(
    name="DPO",
    anchor=anchors.fixed(),
    reward=functools.partial(rewards.sequence_reward, beta=_BETA),
    loss=on_rewards(_ranking_loss),
)
"""DPO of pairs, and of lists from best to worst, with stored anchor logps."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Batches of random groups for a decoder, and what there is to do in each.

    Attributes:
      sizes: of the decoder.
      lengths: of each group.
      groups_per_step: groups of a batch.
      row_length: at least; None: the longest group.
      seed: of ids and parameters.
    """

    sizes: DecoderConfig
    lengths: list[tuple[int, tuple[int, ...]]]
    groups_per_step: int
    row_length: int | None = None
    seed: int = 0

    @functools.cached_property
    def groups(self) -> list[TokenGroup]:
        """One group of each pair of lengths."""
        rng = np.random.default_rng(self.seed)
        return [
            random_group(rng, self.sizes.vocab_size, i, prompt, responses)
            for i, (prompt, responses) in enumerate(self.lengths)
        ]

    @functools.cached_property
    def batches(self):
        """The groups in rows."""
        longest = sources.longest_group(self.groups)
        return sources.evaluation_batches(
            self.groups,
            groups_per_step=self.groups_per_step,
            row_length=max(self.row_length or 0, longest),
        )

    def one_row(self) -> int:
        """Positions of a row that holds all groups of any batch.

        One device needs no second row: what is left at the end of a row is lost once,
        and so are positions that are scored for nothing.
        """
        tokens = [group.num_tokens for group in self.groups]
        size = self.groups_per_step
        most = max(sum(tokens[i : i + size]) for i in range(0, len(tokens), size))
        return -(-most // 128) * 128

    def model_and_params(self):
        """The decoder's functions, and parameters of the seed."""
        model = make_decoder(self.sizes)
        return model, jax.jit(model.init)(jax.random.key(self.seed))

    def of_batch(self, number: int) -> list[tuple[int, tuple[int, ...]]]:
        """Lengths of the groups of a batch."""
        return [self.lengths[i] for i in self.batches.indices(number)]

    def counts(self) -> list[dict[str, int]]:
        """What each batch achieves: groups, and tokens of prompts and responses."""
        return [
            {
                "pairs" if len(self.lengths[0][1]) == 2 else "lists": rows.count_batch(
                    self.batches[number]
                )["examples"],
                "real_tokens": sum(p + sum(r) for p, r in self.of_batch(number)),
            }
            for number in range(len(self.batches))
        ]


def step_on_rows(work: Work, name: str = "rows") -> Variant:
    """A train step of plain SGD on rows."""
    model, params = work.model_and_params()
    optimizer = optax.sgd(1e-4)
    state = init_state(params, optimizer, rng=jax.random.key(0))
    packed = [work.batches[number] for number in range(len(work.batches))]
    return Variant(
        name,
        make_train_step(METHOD, model, optimizer),
        [(state, jax.tree.map(jnp.asarray, batch)) for batch in packed],
        work.counts(),
        str(list(packed[0].tokens.shape)),
    )


def step_on_padded(work: Work) -> Variant:
    """The same step with a row for each response, the prompt repeated."""
    model, params = work.model_and_params()
    optimizer = optax.sgd(1e-4)
    state = init_state(params, optimizer, rng=jax.random.key(0))
    longest = max(p + max(r) for p, r in work.lengths)
    num_predict = max(max(r) for _, r in work.lengths)
    batches = [
        _pad_batch(
            [work.groups[i] for i in work.batches.indices(number)], longest, num_predict
        )
        for number in range(len(work.batches))
    ]

    def step(state, batch):
        def loss(params):
            logps = _padded_logps(model, params, batch).sum(-1)
            values = _BETA * (logps - batch["anchor_logps"].sum(-1))
            where = jnp.ones(values.shape[1], bool)
            return _ranking_loss(values.T, where=where)[0].mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), value

    return Variant(
        "padded",
        step,
        [(state, jax.tree.map(jnp.asarray, batch)) for batch in batches],
        work.counts(),
        str(list(batches[0]["tokens"].shape)),
    )


def _pad_batch(groups, length, num_predict) -> dict[str, np.ndarray]:
    """One response a row, the prompt repeated: the first of all groups comes first."""
    num_responses = len(groups[0].responses)
    rows_of = [(group, k) for k in range(num_responses) for group in groups]
    shape = (len(rows_of), length)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "predict": np.full((shape[0], num_predict), -1, np.int32),
        "length": np.zeros(shape[0], np.int32),
        "anchor_logps": np.zeros((num_responses, len(groups), num_predict), np.float32),
    }
    for i, (group, k) in enumerate(rows_of):
        ids = np.concatenate([group.prompt, group.responses[k]])
        n, first = len(group.responses[k]), len(group.prompt) - 1
        batch["tokens"][i, : len(ids)] = ids
        batch["targets"][i, : len(ids) - 1] = ids[1:]
        batch["predict"][i, :n] = first + np.arange(n)
        batch["length"][i] = len(ids)
        stored = group.extras["anchor_logps"][k]
        batch["anchor_logps"][k, i % len(groups), :n] = stored
    return batch


def _padded_logps(model, params, batch):
    """f32[K, B, T] of the padded layout, by the same model and scoring."""
    index = jnp.arange(batch["tokens"].shape[1])
    position = jnp.broadcast_to(index, batch["tokens"].shape)
    real = index[None] < batch["length"][:, None]
    end = jnp.where(real, batch["length"][:, None], index[None] + 1)
    hidden = model.hidden(params, batch["tokens"], position, end)
    stats = token_stats(
        hidden, model.unembedding(params), batch["targets"], batch["predict"]
    )
    return stats["logp"].reshape(batch["anchor_logps"].shape)


# --- growth ---------------------------------------------------------------------------

_ROW = 2048  # positions of a full row, in the cases of growth


def _full_row(num_groups: int, num_responses: int = 2) -> list:
    """Lengths of groups of one size that fill a row, a third of each the prompt."""
    tokens = _ROW // num_groups
    response = (tokens * 2 // 3) // num_responses - 1
    prompt = tokens + 1 - num_responses * (response + 1)
    return [(prompt, (response,) * num_responses)] * num_groups


def growth_cases(dtype: str = "float32") -> dict[str, dict[str, Work]]:
    """{what grows: {its size: work}}; all else stays, and rows are full."""
    narrow = dataclasses.replace(SMALL, vocab_size=8192, dtype=dtype)

    def work(sizes=narrow, lengths=None, num_rows=1):
        lengths = (lengths or _full_row(8)) * num_rows
        return Work(sizes, lengths, len(lengths), row_length=_ROW)

    return {
        "rows": {str(n): work(num_rows=n) for n in (1, 2, 4)},
        "groups in a row": {
            str(n): work(lengths=_full_row(n)) for n in (1, 2, 4, 8, 16)
        },
        "responses of a prompt": {
            str(k): work(lengths=_full_row(2, k)) for k in (2, 4, 8)
        },
        "vocabulary": {
            str(v): work(dataclasses.replace(narrow, vocab_size=v))
            for v in (8192, 32768, 131072)
        },
        "layers": {
            str(n): work(dataclasses.replace(narrow, num_layers=n)) for n in (2, 4, 8)
        },
    }


def growth(dtype: str) -> dict[str, list[Variant]]:
    """A step on full rows at sizes of one kind at a time."""
    return {
        name: [step_on_rows(work, size) for size, work in cases.items()]
        for name, cases in growth_cases(dtype).items()
    }


# --- share of the peak ----------------------------------------------------------------


def matmul_peak(sizes=(1024, 2048, 4096), repeats: int = 5) -> float:
    """Flops a second of the fastest square float32 matrix product of these sizes."""
    best = 0.0
    product = jax.jit(jnp.matmul)
    for size in sizes:
        square = jax.random.normal(jax.random.key(0), (size, size))
        jax.block_until_ready(product(square, square))
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(product(square, square))
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def share_of_peak(*, calls: int, dtype: str, groups_per_step: int = 8) -> dict:
    """Useful flops a second of DPO steps over those of the best matrix product.

    And where their time goes.

    The product is timed before and after, in the same process; the faster counts.
    """
    lengths = [(256, (128, 128))] * groups_per_step
    works = {
        "12 layers, width 512": Work(DEEP, lengths, groups_per_step),
        "4 layers, width 256": Work(SMALL, lengths, groups_per_step),
    }
    works = {
        name: dataclasses.replace(
            work,
            sizes=dataclasses.replace(work.sizes, dtype=dtype),
            row_length=work.one_row(),
        )
        for name, work in works.items()
    }
    before = matmul_peak()
    steps = [step_on_rows(work, name) for name, work in works.items()]
    line = measure("peak", steps, calls=calls, dtype=dtype)
    peak = max(before, matmul_peak())
    for step, (name, work) in zip(steps, works.items(), strict=True):
        useful = 3 * forward_flops(work.sizes, lengths)
        result = line["variants"][name]
        result["useful_flops"] = useful
        result["share_of_peak"] = round(useful / result["median_seconds"] / peak, 3)
        result["profile"] = profile(step, calls=3)
    del line["time_ratio"], line["temp_bytes_ratio"], line["ratio_is"]
    return line | {"peak_flops_per_second": round(peak), "formula": FORMULA}
