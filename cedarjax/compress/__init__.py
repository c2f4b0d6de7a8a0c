"""Fewer bytes: quantisers, sparsifiers, rotations, sketches, low rank, error feedback and exact bit counts."""

from cedarjax.compress.codec import Codec as Codec
from cedarjax.compress.codec import Compressor as Compressor
from cedarjax.compress.codec import Packed as Packed
from cedarjax.compress.codec import Scope as Scope
from cedarjax.compress.codec import ToldBits as ToldBits
from cedarjax.compress.codec import leafwise as leafwise
from cedarjax.compress.codec import lift as lift
from cedarjax.compress.codec import whole as whole
from cedarjax.compress.count_sketch import count_sketch as count_sketch
from cedarjax.compress.count_sketch import sketch as sketch
from cedarjax.compress.count_sketch import unsketch as unsketch
from cedarjax.compress.counting import largest as largest
from cedarjax.compress.dither import uniforms as uniforms
from cedarjax.compress.drive import drive as drive
from cedarjax.compress.eden import eden as eden
from cedarjax.compress.entropy import code_entropy as code_entropy
from cedarjax.compress.entropy import subset_entropy as subset_entropy
from cedarjax.compress.feedback import CompressionInfo as CompressionInfo
from cedarjax.compress.feedback import CompressionState as CompressionState
from cedarjax.compress.feedback import FeedbackState as FeedbackState
from cedarjax.compress.feedback import with_compression as with_compression
from cedarjax.compress.feedback import with_error_feedback as with_error_feedback
from cedarjax.compress.fetchsgd import FetchSGDState as FetchSGDState
from cedarjax.compress.fetchsgd import fetchsgd as fetchsgd
from cedarjax.compress.fetchsgd import fetchsgd_of_mean as fetchsgd_of_mean
from cedarjax.compress.fetchsgd import keep_largest as keep_largest
from cedarjax.compress.hadamard import hadamard_transform as hadamard_transform
from cedarjax.compress.hadamard import rotate as rotate
from cedarjax.compress.hadamard import rotate_back as rotate_back
from cedarjax.compress.lloyd_max import normal_codebook as normal_codebook
from cedarjax.compress.low_rank import Factors as Factors
from cedarjax.compress.low_rank import orthogonalise as orthogonalise
from cedarjax.compress.low_rank import power_step as power_step
from cedarjax.compress.packing import index_bits as index_bits
from cedarjax.compress.packing import pack_bits as pack_bits
from cedarjax.compress.packing import unpack_bits as unpack_bits
from cedarjax.compress.powersgd import PowerSGDState as PowerSGDState
from cedarjax.compress.powersgd import powersgd as powersgd
from cedarjax.compress.powersgd import powersgd_bits as powersgd_bits
from cedarjax.compress.powersgd import powersgd_mean as powersgd_mean
from cedarjax.compress.powersgd import powersgd_of_mean as powersgd_of_mean
from cedarjax.compress.qsgd import QsgdPayload as QsgdPayload
from cedarjax.compress.qsgd import qsgd as qsgd
from cedarjax.compress.qsgd import qsgd_levels as qsgd_levels
from cedarjax.compress.random_k import SeededPayload as SeededPayload
from cedarjax.compress.random_k import random_k as random_k
from cedarjax.compress.random_k import random_places as random_places
from cedarjax.compress.rotated import RotatedCode as RotatedCode
from cedarjax.compress.rotated import RotatedPayload as RotatedPayload
from cedarjax.compress.rotated import rotated as rotated
from cedarjax.compress.rotated import rotated_quantize as rotated_quantize
from cedarjax.compress.sampled_top_k import Sampling as Sampling
from cedarjax.compress.sampled_top_k import ToldPayload as ToldPayload
from cedarjax.compress.sampled_top_k import sampled_thresholds as sampled_thresholds
from cedarjax.compress.sampled_top_k import sampled_top_k as sampled_top_k
from cedarjax.compress.sampled_top_k import sampling as sampling
from cedarjax.compress.send import send_compressed as send_compressed
from cedarjax.compress.sign import SignPayload as SignPayload
from cedarjax.compress.sign import sign as sign
from cedarjax.compress.terngrad import TernaryPayload as TernaryPayload
from cedarjax.compress.terngrad import ternary as ternary
from cedarjax.compress.terngrad import terngrad as terngrad
from cedarjax.compress.top_k import SparsePayload as SparsePayload
from cedarjax.compress.top_k import num_kept as num_kept
from cedarjax.compress.top_k import top_k as top_k
from cedarjax.compress.uniform import UniformPayload as UniformPayload
from cedarjax.compress.uniform import stochastic_round as stochastic_round
from cedarjax.compress.uniform import uniform_codes as uniform_codes
from cedarjax.compress.uniform import uniform_quantize as uniform_quantize
from cedarjax.compress.uniform import uniform_values as uniform_values

__all__ = [
    "Codec",
    "CompressionInfo",
    "CompressionState",
    "Compressor",
    "Factors",
    "FeedbackState",
    "FetchSGDState",
    "Packed",
    "PowerSGDState",
    "QsgdPayload",
    "RotatedCode",
    "RotatedPayload",
    "Scope",
    "Sampling",
    "SeededPayload",
    "SignPayload",
    "SparsePayload",
    "TernaryPayload",
    "ToldBits",
    "ToldPayload",
    "UniformPayload",
    "code_entropy",
    "count_sketch",
    "drive",
    "eden",
    "fetchsgd",
    "fetchsgd_of_mean",
    "hadamard_transform",
    "index_bits",
    "keep_largest",
    "largest",
    "leafwise",
    "lift",
    "normal_codebook",
    "num_kept",
    "orthogonalise",
    "pack_bits",
    "power_step",
    "powersgd",
    "powersgd_bits",
    "powersgd_mean",
    "powersgd_of_mean",
    "qsgd",
    "qsgd_levels",
    "random_k",
    "random_places",
    "rotate",
    "rotate_back",
    "rotated",
    "rotated_quantize",
    "sampled_thresholds",
    "sampled_top_k",
    "sampling",
    "send_compressed",
    "sign",
    "sketch",
    "stochastic_round",
    "subset_entropy",
    "ternary",
    "terngrad",
    "top_k",
    "uniform_codes",
    "uniform_quantize",
    "uniform_values",
    "uniforms",
    "unpack_bits",
    "unsketch",
    "whole",
    "with_compression",
    "with_error_feedback",
]
