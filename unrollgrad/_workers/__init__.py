"""Many workers as one estimator: the mean, devices, places in the episode, stages."""
