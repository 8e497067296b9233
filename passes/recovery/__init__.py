"""What recovery is made of: examples, losses, the network as something to train, the trainer."""
