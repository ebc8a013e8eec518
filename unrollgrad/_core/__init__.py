"""The foundation: episodes and the one scan over inner steps, dtypes, mesh axes, extras."""
