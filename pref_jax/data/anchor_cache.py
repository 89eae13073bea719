"""Anchor logps, computed once and stored beside the tokens.

With them a fixed anchor's parameters need not be in memory while the policy trains.
They are stored per token: subtracting per token and then summing loses nothing that two
long sums would, and every loss can weigh the tokens as it likes.

A cache of logps is a folder like that of tokens (`pref_jax.data.token_cache`), with the
logps of one batch in a file. Its key names the groups, whose masks are part of them,
and the model; another model, group or mask is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax import axes, processes
from pref_jax.data import token_cache
from pref_jax.data.rows import LazyGroups, RowShape, measure, slots
from pref_jax.data.sources import Batches
from pref_jax.types import PyTree, ResponseBatch, TokenGroup

_DONE_FILE = "done.json"
_RULE = "logps of the masked targets, float32, 0 elsewhere; version 2"


def with_anchor_logps(
    groups: Sequence[TokenGroup],
    *,
    folder: str | os.PathLike,
    batches: Batches,
    score: Callable[[int, ResponseBatch], np.ndarray],
    key: Mapping[str, str],
) -> AnchoredGroups:
    """Groups with the anchor's token logps, which are computed where they are missing.

    Args:
      groups: the ids.
      folder: of the cache of logps.
      batches: `sources.evaluation_batches` of the groups.
      score: (batch number, batch) -> f32[B, K, T], the anchor's logps, 0 outside the
        mask; with several processes of the whole batch, on each of them.
      key: what the logps are made by, such as `params_identity` of the model.

    Returns:
      The groups, with `extras["anchor_logps"]`.

    Raises:
      CacheError: the folder holds logps of other groups or of another model.
    """
    folder = pathlib.Path(folder)
    key = {
        "rule": _RULE,
        **groups_identity(groups),
        "groups_per_file": str(len(batches.indices(0))),
        **key,
    }
    with processes.first_before_others(f"key of {folder.name}"):
        folder.mkdir(parents=True, exist_ok=True)
        token_cache.check_key(folder, key)
    done = folder / _DONE_FILE
    if processes.any_of([not done.exists()])[0]:
        # The first process alone: it is waited for by all others of this run.
        lock = token_cache.locked(folder) if processes.is_first() else _no_lock()
        with lock:
            for number in _missing(folder, len(batches)):
                logps = np.asarray(score(number, batches[number]), np.float32)
                path = token_cache.shard_path(folder, number)
                with processes.first_before_others(path.name):
                    if not path.exists():
                        members = [groups[i] for i in batches.indices(number)]
                        token_cache.write_records(
                            path, _by_group(members, batches.shape, logps)
                        )
            with processes.first_before_others(f"{folder.name} is done"):
                if not done.exists():
                    done.write_text("{}\n")
    return AnchoredGroups(groups, folder)


_no_lock = contextlib.nullcontext


def _missing(folder: pathlib.Path, num_batches: int) -> list[int]:
    """Batches whose file any process lacks: all of them score together."""
    paths = [token_cache.shard_path(folder, number) for number in range(num_batches)]
    return np.flatnonzero(processes.any_of([not p.exists() for p in paths])).tolist()


class AnchoredGroups(LazyGroups):
    """Groups with stored logps; both are read when a group is asked for.

    Attributes:
      lengths: of the groups.

    Args:
      groups: the ids.
      folder: of a complete cache of their logps.
    """

    def __init__(self, groups: Sequence[TokenGroup], folder: pathlib.Path):
        self._groups, self._folder = groups, folder
        self.lengths = measure(groups)
        self._records = token_cache.open_records(folder, len(groups))

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, index: int) -> TokenGroup:
        """Return group `index`, with its logps."""
        group = self._groups[index]
        logps = np.frombuffer(self._records[index], np.float32)
        cuts = np.cumsum([len(response) for response in group.responses])[:-1]
        extras = {**group.extras, "anchor_logps": tuple(np.split(logps, cuts))}
        return dataclasses.replace(group, extras=extras)


def groups_identity(groups: Sequence[TokenGroup]) -> dict[str, str]:
    """What the ids and masks of groups depend on, as parts of a key.

    Of a token cache these are the parts of its own key, so that a changed template is
    refused by that name; of other groups it is a hash.
    """
    if isinstance(groups, token_cache.CachedGroups):
        return {f"tokens, {name}": value for name, value in groups.key.items()}
    parts = (
        part
        for group in groups
        for array in (group.prompt, *group.responses, *group.loss_masks)
        for part in (np.int64(len(array)).tobytes(), np.ascontiguousarray(array))
    )
    return {"groups": _digest(parts)}


def params_identity(params: PyTree) -> str:
    """A hash of parameters: names, shapes, types and every bit.

    It is computed where the parameters lie: nothing is gathered, and neither the mesh
    nor the number of processes changes it. It tells other parameters apart, and is no
    protection against someone who wants them taken for these.
    """

    def parts():
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            yield f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode()
            yield np.asarray(_bit_sums(leaf))

    return _digest(parts())


@jax.jit
def _bit_sums(x):
    """u32[2]: two sums, modulo 2^32, of a hash of every entry's bits and place."""
    if x.dtype == bool:
        x = x.astype(np.uint8)
    if x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, np.uint32)
    size = f"uint{8 * x.dtype.itemsize}"
    bits = jax.lax.bitcast_convert_type(x, size).astype(np.uint32)
    place = jnp.zeros(bits.shape, np.uint32)
    for axis in range(bits.ndim):
        index = jax.lax.broadcasted_iota(np.uint32, bits.shape, axis)
        place = _mix(place + index)
    sums = [_mix(bits ^ _mix(place + seed)).sum(dtype=np.uint32) for seed in (1, 2)]
    return axes.whole(jnp.stack(sums))


def _mix(x):
    """Every bit of a 32-bit number moves about half of the bits of the result."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def _digest(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _by_group(groups, shape: RowShape, logps) -> list[bytes]:
    """The bytes of each group's logps, in the order of the groups of a batch."""
    places = slots([group.num_tokens for group in groups], shape)
    return [
        np.concatenate(
            [logps[b, k, : len(r)] for k, r in enumerate(group.responses)]
        ).tobytes()
        for b, group in zip(places, groups, strict=True)
    ]
