"""2:4 weights on the sparse tensor cores of a GPU, through PyTorch."""
