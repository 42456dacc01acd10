"""Backends: how a model is sharded, trained and read out. ``base`` is the interface, ``fsdp`` the first."""
