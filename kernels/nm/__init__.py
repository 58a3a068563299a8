"""Linear layers with N:M weights."""
