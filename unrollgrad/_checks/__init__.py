"""Checks of what users pass, before anything compiles, and their messages."""
