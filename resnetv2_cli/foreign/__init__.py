"""Weights trained by other code bases."""
