"""Solvers of min ‖W − B·A‖² over ragged groups of layers."""
