"""How a tensor in a file becomes a variable of ours, and back.

A transform is a small frozen object that works on *lists*: `load` turns the arrays of a rule's sources into the arrays
of its targets, `save` does the reverse. So plain renames, transposed kernels, experts stacked from many tensors and a
fused tensor split over several variables are all the same kind of thing. Shapes are known without arrays, which lets a
whole checkpoint be checked before a byte of it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from easydel.hub.safetensors import Index

Shape = tuple[int, ...]


class Transform(Protocol):
    """What a rule needs of its transform."""

    def load(self, arrays: Sequence[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        """Turn the sources' arrays into the targets', which have these shapes (views are fine)."""

    def save(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Turn the targets' arrays into the sources'."""

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape]:
        """Return the shapes the sources must have for targets of these shapes."""

    def source_index(self, index: Index) -> Index | None:
        """Return the block of the (single) source that holds block `index` of the target; `None`: read all."""


class BlockTransform(Transform, Protocol):
    """A transform of several sources or targets that can make blocks of these."""

    def source_blocks(self, target: int, index: Index, targets: Sequence[Shape]) -> list[tuple[int, Index]]:
        """Return which sources, by their numbers, hold block `index` of a target, and where in them it lies."""

    def load_block(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Turn the blocks that `source_blocks` names into the target's."""


@dataclass(frozen=True)
class Permute:
    """Reorder the axes: axis `n` of the target is axis `axes[n]` of the source. `Permute()` keeps them."""

    axes: tuple[int, ...] | None = None

    def load(self, arrays: Sequence[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        """See `Transform.load`."""
        return [array if self.axes is None else array.transpose(self.axes) for array in arrays]

    def save(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Transform.save`."""
        return [array if self.axes is None else array.transpose(self._inverse()) for array in arrays]

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape]:
        """See `Transform.source_shapes`."""
        return [shape if self.axes is None else tuple(shape[n] for n in self._inverse()) for shape in targets]

    def source_index(self, index: Index) -> Index:
        """See `Transform.source_index`."""
        return index if self.axes is None else tuple(index[n] for n in self._inverse())

    def _inverse(self) -> tuple[int, ...]:
        axes = self.axes or ()
        return tuple(axes.index(n) for n in range(len(axes)))


IDENTITY = Permute()
TRANSPOSE = Permute((1, 0))


@dataclass(frozen=True)
class Stack:
    """Many equal sources become one target with a new leading axis (experts stored one by one in the file)."""

    inner: Permute = IDENTITY

    def load(self, arrays: Sequence[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        """See `Transform.load`."""
        return [np.stack(self.inner.load(arrays, targets))]

    def save(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Transform.save`."""
        return self.inner.save(list(arrays[0]))

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape]:
        """See `Transform.source_shapes`."""
        return self.inner.source_shapes([targets[0][1:]] * targets[0][0])

    def source_index(self, index: Index) -> Index | None:
        """See `Transform.source_index`."""
        return None

    def source_blocks(self, target: int, index: Index, targets: Sequence[Shape]) -> list[tuple[int, Index]]:
        """See `BlockTransform.source_blocks`."""
        block = self.inner.source_index(index[1:])
        return [(number, block) for number in range(index[0].start, index[0].stop)]

    def load_block(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """See `BlockTransform.load_block`."""
        return np.stack(self.inner.load(arrays, []))


@dataclass(frozen=True)
class Split:
    """One fused source becomes several targets, cut along `axis` of the source (fused q, k, v in the file)."""

    axis: int = 0
    inner: Permute = IDENTITY

    def load(self, arrays: Sequence[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        """See `Transform.load`."""
        sizes = [shape[self.axis] for shape in self.inner.source_shapes(targets)]
        return self.inner.load(np.split(arrays[0], np.cumsum(sizes)[:-1], self.axis), targets)

    def save(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Transform.save`."""
        return [np.concatenate(self.inner.save(arrays), self.axis)]

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape]:
        """See `Transform.source_shapes`."""
        parts = self.inner.source_shapes(targets)
        whole = list(parts[0])
        whole[self.axis] = sum(part[self.axis] for part in parts)
        return [tuple(whole)]

    def source_index(self, index: Index) -> Index | None:
        """See `Transform.source_index`."""
        return None

    def source_blocks(self, target: int, index: Index, targets: Sequence[Shape]) -> list[tuple[int, Index]]:
        """See `BlockTransform.source_blocks`."""
        before = sum(shape[self.axis] for shape in self.inner.source_shapes(targets[:target]))
        block = list(self.inner.source_index(index))
        block[self.axis] = slice(block[self.axis].start + before, block[self.axis].stop + before)
        return [(0, tuple(block))]

    def load_block(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """See `BlockTransform.load_block`."""
        return self.inner.load(arrays, [])[0]


@dataclass(frozen=True)
class GroupedSplit:
    """One fused source is a row of equal blocks, each with its share of every target (q, k, v fused head by head).

    Attributes:
        groups: how many blocks there are along the source's first axis.
        inner: what becomes of each part.
    """

    groups: int
    inner: Permute = IDENTITY

    def load(self, arrays: Sequence[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        """See `Transform.load`."""
        shapes = self.inner.source_shapes(targets)
        blocks = self._blocks(arrays[0])
        cuts = np.cumsum([shape[0] // self.groups for shape in shapes])[:-1]
        parts = zip(np.split(blocks, cuts, axis=1), shapes, strict=True)
        return self.inner.load([part.reshape(shape) for part, shape in parts], targets)

    def save(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Transform.save`."""
        blocks = np.concatenate([self._blocks(part) for part in self.inner.save(arrays)], axis=1)
        return [blocks.reshape(-1, *blocks.shape[2:])]

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape]:
        """See `Transform.source_shapes`."""
        return Split(0, self.inner).source_shapes(targets)

    def source_index(self, index: Index) -> Index | None:
        """See `Transform.source_index`."""
        return None

    def _blocks(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.groups, -1, *array.shape[1:])


@dataclass(frozen=True)
class Interleave:
    """One source becomes targets whose entries along `axis` take turns in it (gate and up fused column by column)."""

    axis: int

    def load(self, arrays: Sequence[np.ndarray], targets: Sequence[Shape]) -> list[np.ndarray]:
        """See `Transform.load`."""
        before = (slice(None),) * self.axis
        return [arrays[0][(*before, slice(n, None, len(targets)))] for n in range(len(targets))]

    def save(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Transform.save`."""
        return [np.stack(arrays, self.axis + 1).reshape(self.source_shapes([array.shape for array in arrays])[0])]

    def source_shapes(self, targets: Sequence[Shape]) -> list[Shape]:
        """See `Transform.source_shapes`."""
        whole = list(targets[0])
        whole[self.axis] *= len(targets)
        return [tuple(whole)]

    def source_index(self, index: Index) -> Index | None:
        """See `Transform.source_index`."""
        return None
