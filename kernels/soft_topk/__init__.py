"""The soft top-k of Spartan."""
