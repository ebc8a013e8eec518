"""Tools for any problem: measure estimators, train an outer loop."""
