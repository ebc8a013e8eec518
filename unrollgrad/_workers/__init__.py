"""Many workers as one estimator: their mean, devices, places in the episode, and stages."""
