"""Fields of a config that can be changed at once, so that one compiled model shows the effect of each."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.models.inputs import as_torch
from tests.models.pairs import Pair, build_hf, pair
from tests.models.table import FAMILIES

NOT_OF_LOGITS = {
    "output_hidden_states": "of outputs",
    "output_attentions": "of outputs",
    "output_router_logits": "of outputs",
    "pad_token_id": "of gradients: test_padding_token_s_embedding_is_not_trained",
    "partial_rotary_factor": "transformers' Llama does not read it, so neither does ours",
}
ALSO_OF_LOGITS = {("roberta", "pad_token_id"): "its positions begin after it"}

Group = tuple[str, ...]


class Changes:
    """A family's fields, each with the change whose effect is compared."""

    def __init__(self, family: str, variant: str) -> None:
        self.family, self.variant = family, variant
        self.fields = FAMILIES[family].fields

    def pair(self, group: Group) -> Pair:
        """Return both models with the fields of a group changed."""
        return pair(self.family, self.variant, **self.of(group))

    def inputs(self) -> dict[str, Any]:
        """Return what the models are given: tokens that the unchanged config knows."""
        plain = pair(self.family, self.variant)
        ids = plain.ids(2, 40)
        ids[:, 5] = 3
        return plain.inputs(ids)

    def shows(self, field: str, group: Group) -> bool:
        """Return whether transformers' logits depend on a field's change, the group's others made, as they should."""
        one, other = self._logits(group), self._logits(tuple(name for name in group if name != field))
        if one is None or other is None:
            return False
        differs = one.shape != other.shape or float((one - other).abs().max() / other.abs().max()) > 1e-3
        return differs == (field not in NOT_OF_LOGITS or (self.family, field) in ALSO_OF_LOGITS)

    def groups(self) -> list[Group]:
        """Arrange all fields in groups whose changes are of different entries, and hide none of one another."""
        left, groups = list(self.fields), []
        while left:
            group: Group = (left[0],)
            for field in left[1:]:
                if self._go_together((*group, field)):
                    group = (*group, field)
            while hidden := [field for field in group if not self.shows(field, group)]:
                if left[0] in hidden:
                    group = (left[0],)
                    break
                group = tuple(field for field in group if field not in hidden)
            groups.append(group)
            left = [field for field in left if field not in group]
        return groups

    def of(self, group: Group) -> dict[str, Any]:
        """Return the entries that a group's changes set."""
        return {name: value for field in group for name, value in self.fields[field].items()}

    def _go_together(self, group: Group) -> bool:
        of_different_entries = len(self.of(group)) == sum(len(self.fields[field]) for field in group)
        return of_different_entries and self.shows(group[-1], group)

    @functools.cache  # noqa: B019 - lives as long as one test
    def _logits(self, group: Group) -> torch.Tensor | None:
        """Return transformers' logits; `None` if it refuses these changes together."""
        entry = FAMILIES[self.family]
        config = {**entry.config, **entry.variant(self.variant).config, **self.of(group)}
        try:
            model = build_hf(entry, entry.main_task, config)
            with torch.no_grad():
                return model(**as_torch(self.inputs())).logits
        except Exception:  # refused, or stumbled over, in one way or another; alone, each change must work
            if len(group) < 2:
                raise
            return None
