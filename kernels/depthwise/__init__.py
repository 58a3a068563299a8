"""Convolutions with one filter a channel."""
