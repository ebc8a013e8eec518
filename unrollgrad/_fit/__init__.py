"""The outer loop: dispatches, data, checkpoints, interruptions."""
