"""The parts of ``benchmarks/gpu.py``: what is measured, how, and where it is written."""
