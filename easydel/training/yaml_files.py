"""YAML as it is meant: `1e-4` is a number, and nothing stands in a mapping twice."""

from __future__ import annotations

import functools
import re
from typing import Any

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_yaml(text: str, where: str) -> Any:
    """Read YAML text.

    PyYAML follows YAML 1.1, which takes `1e-4` for text, and lets the last of two equal names win.

    Args:
        text: to read.
        where: what it is called in messages, such as the file's name.

    Raises:
        ValueError: it is no YAML, or a name stands twice in a mapping; the line is named.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where}{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value!r} stands there twice", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_EXPONENT.pattern + "$"), list("-+.0123456789"))
    return Loader
