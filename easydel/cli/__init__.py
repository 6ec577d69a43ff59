"""The command line: thin commands over the library."""

from __future__ import annotations


def main() -> None:
    """Run the `easydel` command on the arguments of this process."""
    import os

    from easydel.cli.app import app

    # Without torch transformers says so on import; here it is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    app(prog_name="easydel")
