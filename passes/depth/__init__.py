"""How blocks to remove are chosen: scores of single blocks, and TinyFusion's search over groups of them."""
