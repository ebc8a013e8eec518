"""Learned optimizers: meta-training and evaluation."""
