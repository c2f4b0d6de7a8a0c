"""Fewer bytes: quantisers, sparsifiers, rotations, sketches, low rank, error feedback and exact bit counts."""

from cedarjax.compress.codec import Codec as Codec
from cedarjax.compress.codec import Compressor as Compressor
from cedarjax.compress.codec import Packed as Packed
from cedarjax.compress.codec import leafwise as leafwise
from cedarjax.compress.codec import whole as whole

__all__ = ["Codec", "Compressor", "Packed", "leafwise", "whole"]
