"""Which timesteps a sampler goes through, and which blocks it leaves out at each: an evolutionary search."""
