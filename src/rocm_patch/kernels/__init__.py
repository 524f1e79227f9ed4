"""Fused convolution kernels in Triton, and how they get onto a card.

The sources (`gemm`, `direct`, `winograd`, `layout`) import Triton, nothing else of ours knows its language. Which
convolution takes which kernel is the affair of `rocm_patch.conv`.
"""
