"""What the benchmark programs share: timing, rows, stamps, tables, parts of a report."""
