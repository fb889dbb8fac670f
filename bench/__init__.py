"""Benchmarks of the router, the experts and the whole block: providers side by side, checked, against the floor.

Reached as `omnigene_fast.bench` (a symlink, as for the kernels), so that it works from a checkout and from a wheel.
"""
