"""`python -m easydel`: the same program as the `easydel` command."""

from __future__ import annotations

from easydel.cli import main

if __name__ == "__main__":
    main()
