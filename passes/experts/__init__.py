"""How feed-forwards become experts: where they are, which neurons go together, and the layer that routes tokens."""
