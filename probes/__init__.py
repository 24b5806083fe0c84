"""Measure a model, ablated or not: every function takes a model and returns tidy numbers."""
