"""Dialogues, packing and BIG-Bench Hard."""
