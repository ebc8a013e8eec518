"""What everything else is built on: episodes and the one scan, dtypes, mesh axes."""
