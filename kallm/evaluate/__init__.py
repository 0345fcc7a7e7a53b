"""Suites: what a trained cell is measured by."""
