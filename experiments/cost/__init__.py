"""Time and memory of estimators, compared with a floor."""
