"""How experiments run, what they leave behind, and how that is read and reported."""
