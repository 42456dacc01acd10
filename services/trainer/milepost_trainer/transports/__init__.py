"""Transports of weights: one small file each behind the interface in ``base``."""
