"""Anchor logps, computed once and stored beside the tokens.

With them a fixed anchor's parameters need not be in memory while the policy trains.
They are stored per token: subtracting per token and then summing loses nothing that two
long sums would, and every loss can weigh the tokens as it likes.

A cache of logps is a folder like that of tokens (`pref_jax.data.token_cache`), with the
logps of one batch in a file. Its key names the groups, whose masks are part of them,
and the model; another model, group or mask is refused by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from pref_jax.data import token_cache
from pref_jax.data.rows import LazyGroups, RowShape, measure, slots
from pref_jax.data.sources import Batches
from pref_jax.types import PyTree, ResponseBatch, TokenGroup

_DONE_FILE = "done.json"
_RULE = "logps of the masked targets, float32, 0 elsewhere; version 1"


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
        mask.
      key: what the logps are made by, such as `params_identity` of the model.

    Returns:
      The groups, with `extras["anchor_logps"]`.

    Raises:
      CacheError: the folder holds logps of other groups or of another model.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups_per_file = len(batches.indices(0))
    token_cache.check_key(
        folder,
        {
            "rule": _RULE,
            **groups_identity(groups),
            "groups_per_file": str(groups_per_file),
            **key,
        },
    )
    if not (folder / _DONE_FILE).exists():
        with token_cache.locked(folder):
            for number in range(len(batches)):
                path = token_cache.shard_path(folder, number)
                if not path.exists():
                    members = [groups[i] for i in batches.indices(number)]
                    logps = np.asarray(score(number, batches[number]), np.float32)
                    token_cache.write_records(
                        path, _by_group(members, batches.shape, logps)
                    )
            (folder / _DONE_FILE).write_text("{}\n")
    return AnchoredGroups(groups, folder)


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
    """A hash of parameters: names, shapes, types and every bit."""

    def parts():
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            array = np.asarray(jax.device_get(leaf))
            yield f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode()
            yield np.ascontiguousarray(array).view(np.uint8)

    return _digest(parts())


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
