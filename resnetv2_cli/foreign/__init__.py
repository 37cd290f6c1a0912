"""Weights that other code bases have trained."""
