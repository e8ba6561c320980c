"""Optimizers that protect old tasks: EWCAdamW; around any optimizer EWC, GEM and InputProjection.

They import `ops` and `importance`, and nothing above them.
"""
