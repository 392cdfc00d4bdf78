"""Benchmarks: each program runs as `python -m benchmarks.<name>`, see README.md."""
