"""Weights between the old ones and the new: how far to go back."""
