"""How fast it is, against what, and whether it became slower. Each benchmark runs as `python -m benchmarks.<name>`.

timing.py measures, stamp.py says under which circumstances, record.py keeps both, compare.py finds what got slower.
"""
