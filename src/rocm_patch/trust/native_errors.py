"""Whose fault is an exception from a native convolution: the vendor library's, the GPU's, or the caller's?"""

from __future__ import annotations

import re

# MIOpen's status names and torch's wording when it finds no solver: aten/src/ATen/native/miopen/Conv_miopen.cpp
# and aten/src/ATen/miopen/Exceptions.h (torch 1.13, 2.6). The cuDNN lines are what stands in for them on NVIDIA:
# aten/src/ATen/cudnn/Exceptions.h, aten/src/ATen/native/cudnn/Conv_v8.cpp.
_LIBRARY = re.compile(
    r"miopenStatus\w+|MIOpen Error|no suitable algorithm|unable to find (an engine|a valid cuDNN algorithm)"
    r"|CUDNN_STATUS_(NOT_SUPPORTED|INTERNAL_ERROR|EXECUTION_FAILED|NOT_INITIALIZED)",
    re.IGNORECASE,
)
# c10/hip/HIPException.cpp prefixes every failed HIP call so; after one the context is unusable.
_DEVICE = re.compile(r"\b(HIP|CUDA) error\b|\bhipError\w+|\bHSA_STATUS_ERROR\w*", re.IGNORECASE)
# Too little memory loses no context, though the runtime may have been the one to say it.
_MEMORY = re.compile(
    r"out of memory|can't allocate memory|hipErrorOutOfMemory|miopenStatusAllocFailed|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def blame(error: RuntimeError) -> str:
    """`library` or `memory` (a bypass can serve the call), `device` (the GPU context is lost) or `caller`."""
    text = str(error)
    if _MEMORY.search(text):
        return "memory"
    if _DEVICE.search(text):
        return "device"
    return "library" if _LIBRARY.search(text) else "caller"
