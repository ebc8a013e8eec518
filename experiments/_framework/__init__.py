"""How experiments run, which files they write, and how these are read and reported."""
