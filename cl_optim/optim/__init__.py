"""Optimizers that protect old tasks: EWCAdamW, and around any optimizer GEM, InputProjection.

They import `ops` and `importance`, and nothing above them.
"""
