"""The command line: thin commands over the library."""

from __future__ import annotations


def main() -> None:
    """Run the `easydel` command on the arguments of this process."""
    from easydel.cli.app import app

    app(prog_name="easydel")
