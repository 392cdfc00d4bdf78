"""What the benchmark programs share: roofs, rows, stamps, tables, parts of a report."""
