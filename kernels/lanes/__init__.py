"""Convolutions and pooling of images in lanes, for inference."""
