"""Tensors as bytes on the link, and back."""
