"""Pretrained models: where they come from, their surgery, trunk and tail."""
