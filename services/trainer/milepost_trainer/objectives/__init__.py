"""Objectives: one small file per algorithm, pure functions on packed tensors behind one interface
(``base``)."""
