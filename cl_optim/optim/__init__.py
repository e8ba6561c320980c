"""Optimizers that protect old tasks: EWCAdamW, and GEM around any optimizer.

They import `ops` and `importance`, and nothing above them.
"""
