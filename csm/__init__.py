"""Calibration-aware semantic mixing: the algorithms, in plain torch, diffusers and polars (one process, no Ray, no MLflow)."""

__version__ = "0.1.0"
