"""Checkpoints that come in several forms: each group of variables is read from the form its file holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from easydel.hub.weight_map import Link


def choose_links(forms: Mapping[str, Sequence[Link]], names: Collection[str]) -> list[Link]:
    """Choose the links by which a file with these tensor names is read.

    Variables that some form makes of one tensor are read together. Of each such group the form wins of whose sources
    the largest share is there (all, in a sound file); if several have the same share, the one that the rest of the file
    has, then the first. So tensors that are missing are named as the file would name them.

    Args:
        forms: form → all links of the module, the form that saving writes first.
        names: of the tensors in the file.
    """
    if len(forms) == 1:
        return list(*forms.values())
    root = _groups([link for links in forms.values() for link in links])
    chosen: dict[str, list[Link]] = {}
    shares: dict[str, float] = {}
    found_in = {form: sum(s in names for link in links for s in link.sources) for form, links in forms.items()}
    for form in sorted(forms, key=lambda form: -found_in[form]):
        links = forms[form]
        members: dict[str, list[Link]] = {}
        for link in links:
            members.setdefault(root[link.targets[0]], []).append(link)
        for group, found in members.items():
            sources = [source for link in found for source in link.sources]
            share = sum(source in names for source in sources) / max(len(sources), 1)
            if share > shares.get(group, -1.0):
                shares[group], chosen[group] = share, found
    return [link for links in chosen.values() for link in links]


def _groups(links: Sequence[Link]) -> dict[str, str]:
    """Return path → the path that stands for its group: paths are in one if a chain of shared links joins them."""
    parent = {path: path for link in links for path in link.targets}

    def find(path: str) -> str:
        while parent[path] != path:
            path = parent[path]
        return path

    for link in links:
        for path in link.targets[1:]:
            parent[find(path)] = find(link.targets[0])
    return {path: find(path) for path in parent}
