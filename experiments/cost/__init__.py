"""Time and memory beside the floor."""
