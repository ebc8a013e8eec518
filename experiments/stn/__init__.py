"""Self-tuning networks: hyperparameters that follow a best response, learned while training."""
