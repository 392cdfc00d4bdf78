"""The network: transformer.py, its attention and initial weights, and the public checkpoints' names."""
