"""Benchmarks of quality, speed and cost growth; see the README beside this file."""
