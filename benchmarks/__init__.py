"""How fast it is, against what, and whether it became slower. Each benchmark runs as `python -m benchmarks.<name>`.

timing.py measures, stamp.py says under which circumstances, record.py keeps both, compare.py finds what got slower, and
ab.py takes two trees in turns for it. gpu_report.py runs everything there is, readme.py publishes the newest results.
"""
