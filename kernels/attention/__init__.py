"""Attention for inference."""
