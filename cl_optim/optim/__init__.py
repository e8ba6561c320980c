"""Optimizers that protect old tasks."""
