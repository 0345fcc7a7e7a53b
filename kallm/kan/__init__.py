"""Bases, KAN layers, and the modules that stand in for a pretrained feed-forward network."""
