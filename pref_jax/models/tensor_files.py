"""safetensors files: every tensor mapped into memory, and read where it is touched."""

from __future__ import annotations

import dataclasses
import json
import mmap
import pathlib

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""Types of tensors that are read, as the files call them."""


class CheckpointFormatError(ValueError):
    """A checkpoint folder that cannot be read as the model it says it is."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, mapped into memory and not read yet."""

    pages: mmap.mmap
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The whole tensor, read where it is touched."""
        values = np.frombuffer(
            self.pages,
            DTYPES[self.dtype],
            count=int(np.prod(self.shape)),
            offset=self.start,
        )
        return values.reshape(self.shape)

    def release(self) -> None:
        """Give back the memory of the pages that were read; the file has them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = self.start // mmap.PAGESIZE * mmap.PAGESIZE
            self.pages.madvise(mmap.MADV_DONTNEED, first, self.stop - first)


def stored_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its name in the files."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files, promised = ["model.safetensors"], None
    if index.is_file():
        try:
            promised = json.loads(index.read_text())["weight_map"]
            files = sorted({str(file) for file in promised.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointFormatError(
                f"{index} does not map tensors to files: {error!r}"
            ) from error
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if pathlib.PurePath(name).name != name:
            raise CheckpointFormatError(
                f"{index} names the file {name!r}; all parts lie beside it."
            )
        path = folder / name
        if not path.is_file():
            others = sorted(
                p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*"))
            )
            raise CheckpointFormatError(
                f"{folder} has no {name}"
                + (
                    f", only {', '.join(others)}; pickles are not read"
                    if others
                    else ""
                )
                + ". Save the model with safetensors."
            )
        try:
            with safe_open(path, framework="numpy"):
                pass  # checks that the header is whole and its ranges fill the file
        except SafetensorError as error:
            raise CheckpointFormatError(
                f"{path} is not a whole safetensors file: {error}"
            ) from error
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(pages[:8], "little")
        header = json.loads(pages[8 : 8 + size])
        header.pop("__metadata__", None)
        for key, entry in header.items():
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            shape = tuple(entry["shape"])
            if key in tensors:
                raise CheckpointFormatError(f"{folder} has the tensor {key} twice.")
            tensors[key] = StoredTensor(pages, start, stop, entry["dtype"], shape)
    lacking = sorted(set(promised or ()) - set(tensors))
    if lacking:
        raise CheckpointFormatError(
            f"{index} promises {len(lacking)} tensors that its files lack, first "
            f"{lacking[0]}."
        )
    return tensors


_STRIP = 16  # rows that are turned at once: as many lines of the cache are written to


def copy_turned(out: np.ndarray, values: np.ndarray) -> None:
    """out[...] = values; a transposed view in strips, which is several times faster.

    Args:
      out: contiguous.
      values: of the same shape.
    """
    if out.dtype == values.dtype:  # plain bits are copied faster than bfloat16
        bits = f"u{out.dtype.itemsize}"
        out, values = out.view(bits), values.view(bits)
    # Neighbouring axes that are one run in both are one axis.
    shape, strides = [1], [None]
    for size, stride in zip(values.shape, values.strides, strict=True):
        if strides[-1] == size * stride:
            shape[-1], strides[-1] = shape[-1] * size, stride
        else:
            shape.append(size)
            strides.append(stride)
    _copy_strips(out.reshape(shape[1:]), values.reshape(shape[1:]))


def _copy_strips(out, values):
    num_rows = values.size // max(1, values.shape[int(np.argmin(values.strides))])
    is_turned = values.strides != tuple(sorted(values.strides, reverse=True))
    if not is_turned or num_rows <= _STRIP:
        # Cast in the order that the file has, then turned.
        out[...] = values.astype(out.dtype, order="K", copy=False)
        return
    sizes = zip(values.shape, values.strides, strict=True)
    axis = int(np.argmax([stride * (size > 1) for size, stride in sizes]))
    step = max(1, _STRIP * values.shape[axis] // num_rows)
    for start in range(0, values.shape[axis], step):
        strip = (slice(None),) * axis + (slice(start, start + step),)
        _copy_strips(out[strip], values[strip])
