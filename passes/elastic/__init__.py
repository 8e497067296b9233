"""Networks of which each step computes a part: which blocks, and how wide their feed-forwards (Elastic DiT)."""
