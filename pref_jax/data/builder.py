"""Your files as a prepared tfds data set, which is read at random and by many hosts.

Each record is one JSON text, since the rows of a file may differ in form and the typed
features of tfds cannot hold lists in lists without tensorflow. `readers.read` of
`tfds:NAME` gives the same records as the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pref_jax.data.readers import check_stored, read
from pref_jax.data.records import RecordError, Records


def prepare(
    name: str,
    splits: Mapping[str, Any],
    *,
    data_dir: str | os.PathLike,
    version: str = "1.0.0",
    on_error: str = "raise",
) -> dict[str, Records]:
    """Write a tfds data set, as array_record, of anything that `readers.read` reads.

    Args:
      name: of the data set, in small letters, digits and underscores.
      splits: {split: source}, each a source of `readers.read` that needs no split.
      data_dir: the folder of data sets; `read` looks in `$TFDS_DATA_DIR`.
      version: three numbers.
      on_error: "raise" or "skip", as in `readers.read`.

    Returns:
      The records that were written, by split, with the account of what was left out.
      The rows in the files are counted after the build.

    Raises:
      ValueError: this version is there already, or the name or the version will not do.
      RecordError: as `readers.read`; or the files hold another number of rows.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> pairs = [{"prompt": "1 + 1 =", "chosen": "2", "rejected": "3"}]
    >>> found = prepare("sums", {"train": pairs}, data_dir=folder)
    >>> len(found["train"])
    1
    >>> os.environ["TFDS_DATA_DIR"] = folder
    >>> read("tfds:sums", split="train")[0].where
    'tfds:sums:1.0.0/train[0]'
    >>> del os.environ["TFDS_DATA_DIR"]
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"`name` must be small letters, digits and underscores, a letter first; "
            f"got {name!r}."
        )
    found = {split: read(source, on_error=on_error) for split, source in splits.items()}
    folder = Path(data_dir, name, version)
    if folder.exists():
        raise ValueError(
            f"{folder} is there already; tfds would leave it as it is. Give another "
            "`version`, or remove the folder."
        )
    builder = _make_builder(name, version, found, Path(data_dir))
    with contextlib.redirect_stdout(sys.stderr):  # tfds prints
        builder.download_and_prepare()
    for split, records in found.items():
        check_stored(builder, split)
        written = builder.info.splits[split].num_examples
        if written != len(records):
            raise RecordError(
                f"{folder}, {split}",
                f"{len(records)} records were to be written, and {written} were.",
            )
    return found


def _make_builder(
    name: str, version: str, found: Mapping[str, Records], data_dir: Path
) -> Any:
    import tensorflow_datasets as tfds

    class RecordsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Records as JSON texts, in their order."""

        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Records of pref_jax.data.records, one JSON text each.",
                features=tfds.features.FeaturesDict({"json": tfds.features.Text()}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # the records are at hand
            return {
                split: self._generate_examples(records)
                for split, records in found.items()
            }

        def _generate_examples(self, records):
            for number, record in enumerate(records):
                yield number, {"json": json.dumps(record.to_row())}

    RecordsBuilder.name = name
    return RecordsBuilder(data_dir=data_dir, file_format="array_record")
