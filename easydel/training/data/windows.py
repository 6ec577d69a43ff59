"""Fixed-length windows over one long row of tokens: what a language model trains and is measured on.

Every window starts with the tokenizer's begin token, so that a prompt (which starts with it too) looks
like what the model has seen. Windows are a pure function of (seed, step): a run that is taken up again
sees the batches that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from easydel.training.data.batch import IGNORED, Batch


@dataclass(frozen=True)
class WindowedText:
    """Tokens of a text, cut into windows of `length` tokens of which the first is `begin_id`.

    Attributes:
        tokens: int32 [n], without begin tokens.
        length: tokens of a window, the begin token included.
        begin_id: the id every window starts with.
    """

    tokens: np.ndarray
    length: int
    begin_id: int

    def __post_init__(self) -> None:
        """Refuse a text that does not fill a single window."""
        if self.length < 2 or len(self.tokens) < self.length:
            raise ValueError(
                f"a text of {len(self.tokens)} tokens gives no window of {self.length}: "
                "use a longer text or a shorter window (at least 2 tokens)"
            )

    @property
    def windows_per_epoch(self) -> int:
        """Whole windows in one pass, whatever offset the pass starts from."""
        return max((len(self.tokens) - self.length) // (self.length - 1), 1)

    def train_batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """Return the batch of one step: `input_ids` and `labels`, int32 [batch_size, length].

        A pass over the text visits each window once, in a new order and from a new offset; a batch that
        reaches over the end of a pass is filled from the next one.
        """
        rows = [self._train_window(step * batch_size + row, seed) for row in range(batch_size)]
        input_ids = np.stack(rows)
        return {"input_ids": input_ids, "labels": input_ids}

    def eval_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield the whole text in order (at most `limit` windows), each token once as a label.

        The last batch is padded to `batch_size` with windows whose labels are all ignored.
        """
        step = self.length - 1
        starts = range(0, len(self.tokens), step)[:limit]
        for first in range(0, len(starts), batch_size):
            input_ids = np.full((batch_size, self.length), self.begin_id, np.int32)
            labels = np.full((batch_size, self.length), IGNORED, np.int32)
            for row, start in enumerate(starts[first : first + batch_size]):
                piece = self.tokens[start : start + step]
                input_ids[row, 1 : len(piece) + 1] = piece
                labels[row, 1 : len(piece) + 1] = piece
            yield {"input_ids": input_ids, "labels": labels}

    def _train_window(self, index: int, seed: int) -> np.ndarray:
        epoch, position = divmod(index, self.windows_per_epoch)
        random = np.random.default_rng((seed, epoch))
        offset = int(random.integers(0, self.length - 1)) if len(self.tokens) > 2 * self.length else 0
        start = offset + int(random.permutation(self.windows_per_epoch)[position]) * (self.length - 1)
        return np.concatenate([[self.begin_id], self.tokens[start : start + self.length - 1]]).astype(np.int32)
