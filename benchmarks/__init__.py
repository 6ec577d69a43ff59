"""What the README's numbers are made with; see benchmarks/README.md."""
