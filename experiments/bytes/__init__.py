"""Accuracy against uploaded bytes: layer masks, quantisers, sparsifiers, sketches, and what they make together."""
