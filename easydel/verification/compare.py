"""Two records of the same run, part by part in the order of execution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from easydel.verification.matching import is_layer
from easydel.verification.recording import Call
from easydel.verification.report import FINITE, Part


def relative_error(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> tuple[float, str]:
    """Return `max|ours - theirs| / max|theirs|` where there are tokens, and why it is infinite if it is.

    Batch and sequence may be one axis on either side, heads may stand before the sequence, and what is the same for
    all rows may be there once.

    Args:
        ours: of any shape; `[batch, sequence, …]` or `[batch * sequence, …]` if it is of each token.
        theirs: likewise.
        mask: 0 where there is no token, `[batch, sequence]`.
    """
    layouts = [x for x in _layouts(theirs, len(mask)) if x.shape == ours.shape]
    if not layouts and theirs.size == ours.size and theirs.shape[-1:] == ours.shape[-1:]:
        layouts = [theirs.reshape(ours.shape)]
    if not layouts:
        return math.inf, f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    errors = [_error(_of_tokens(ours, mask), _of_tokens(x, mask)) for x in layouts]
    return min(errors), "" if math.isfinite(min(errors)) else FINITE


def _layouts(x: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    yield x
    if x.ndim > 1 and x.shape[0] == 1:
        yield np.broadcast_to(x, (batch, *x.shape[1:]))
    if x.ndim == 4:
        yield x.swapaxes(1, 2)


def _of_tokens(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if x.shape[:2] == mask.shape:
        return x[mask == 1]
    return x[mask.ravel() == 1] if x.ndim > 1 and x.shape[0] == mask.size else x


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.inf
    least = float(np.finfo(np.float32).tiny)  # zeros are equal to zeros
    return float(np.abs(ours.astype(np.float64) - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), least))


@dataclass(frozen=True)
class Comparison:
    """Compares the records of two runs.

    Attributes:
        ours: path → call here.
        theirs: name → call in transformers.
        names: path → name of the modules that are the same.
        mask: 0 where there is no token, `[batch, sequence]`.
        tolerance: the largest error that is allowed.
    """

    ours: Mapping[str, Call]
    theirs: Mapping[str, Call]
    names: Mapping[str, str]
    mask: np.ndarray
    tolerance: float

    def part(self, name: str, path: str, ours: np.ndarray, theirs: np.ndarray, input_error: float = 0.0) -> Part:
        """Compare two arrays."""
        error, note = relative_error(ours, theirs, self.mask)
        return Part(name, path, error, input_error, error <= self.tolerance, note)

    def module(self, path: str) -> Part | None:
        """Compare what a module returns, and what it was given; `None`: it returns no floats on one of the sides."""
        name = self.names[path]
        one, other = self.ours[path], self.theirs[name]
        if not one.made or not other.made:
            return None
        if one.given is None or other.given is None:
            input_error = 0.0 if one.given is other.given else math.inf
        else:
            input_error, _ = relative_error(one.given, other.given, self.mask)
        return self.part(name, path, one.made[0], other.made[0], input_error)

    def order(self, path: str) -> int:
        """Return when a module's call ended."""
        return self.theirs[self.names[path]].order

    def layers(self) -> list[str]:
        """Return the paths of all layers, in the order of execution."""
        return sorted(filter(is_layer, self.names), key=self.order)

    def stages(self) -> list[tuple[float, Part]]:
        """Return embeddings, layers, and the modules that follow the layers beside them, each with its time.

        Embeddings are what the first layer of a stack is given: families do different things between the lookup and
        it. In this order, each is right only if what comes before is.
        """
        layers, found = self.layers(), []
        stacks = dict.fromkeys(path.rpartition("/")[0] for path in layers)
        for stack in stacks:
            own = [path for path in layers if path.rpartition("/")[0] == stack]
            found += self._embeddings(own[0], alone=len(stacks) == 1)
            beside = [
                path
                for path in self.names
                if path.rpartition("/")[0] == stack.rpartition("/")[0] and not is_layer(path)
                if self.order(path) > self.order(own[-1]) and not any(layer.startswith(f"{path}/") for layer in layers)
            ]
            found += [(self.order(path), part) for path in (*own, *beside) if (part := self.module(path)) is not None]
        return sorted(found, key=lambda stage: stage[0])

    def _embeddings(self, layer: str, *, alone: bool) -> list[tuple[float, Part]]:
        name = self.names[layer]
        one, other = self.ours[layer].given, self.theirs[name].given
        if one is None or other is None:
            return []
        inside = [call.order for of, call in self.theirs.items() if of == name or of.startswith(f"{name}.")]
        stack = name.rpartition(".")[0].rpartition(".")[0]
        return [(min(inside) - 0.5, self.part("embeddings" if alone else f"{stack}: embeddings", "", one, other))]

    def inside(self, part: Part, after: float, before: float) -> list[Part]:
        """Return the modules of both sides inside a part that is no other part, in the order of execution.

        Left out are modules whose outputs are not the same thing on both sides: in a layer before, which agrees, they
        do not agree either.
        """
        layers = self.layers()
        if part.path in layers:
            paths = [path for path in self.names if path.startswith(f"{part.path}/")]
        else:
            paths = [
                path
                for path in self.names
                if after < self.order(path) < before
                and not any(path == x or path.startswith(f"{x}/") or x.startswith(f"{path}/") for x in layers)
            ]
        found = [self.module(path) for path in sorted(paths, key=self.order)]
        comparable = [one for one in found if one is not None and not one.note.startswith("shapes")]
        return [one for one in comparable if self._means(one, part)]

    def _means(self, one: Part, layer: Part) -> bool:
        stack, _, number = layer.path.rpartition("/")
        if not is_layer(layer.path):
            return True
        rest = one.path.removeprefix(f"{layer.path}/")
        for earlier in range(int(number)):
            whole, same = f"{stack}/{earlier}", f"{stack}/{earlier}/{rest}"
            if {whole, same} <= self.names.keys() and self._agrees(whole) and not self._agrees(same):
                return False
        return True

    def _agrees(self, path: str) -> bool:
        part = self.module(path)
        return part is not None and part.agrees


def first_inside(part: Part, inside: list[Part], tolerance: float) -> Part:
    """Return the first module whose output differs though what it is given does not; the part itself if there is none.

    A module inside another that agrees does not count.
    """
    for one in inside:
        around = [other for other in inside if other.path and one.path.startswith(f"{other.path}/")]
        if not one.agrees and one.input_error <= tolerance and not any(other.agrees for other in around):
            return one
    return part
