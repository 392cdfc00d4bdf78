"""Which implementation of each op is the fastest here: cases at the shapes of a run, timing, and the choice."""
