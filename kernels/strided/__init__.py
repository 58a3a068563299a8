"""Strided 1:M: one entry of every M that lie a stride apart."""
