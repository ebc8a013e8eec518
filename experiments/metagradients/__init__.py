"""Experiments on metagradients: data attribution, data selection, schedules, metasmoothness."""
