"""Scripts that make what the package carries; not part of the package."""
