"""Saving and export: the delta of a retrofitted model, and a folder for transformers alone."""
