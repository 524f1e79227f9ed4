"""Which GPUs the user's own variables leave visible, as ROCr, HIP and torch read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rocm_patch.machine.hardware import Gpu

# ROCr's filter comes first and renumbers; HIP's own comes before CUDA's, which counts where HIP's is empty
# (ROCm/clr rocclr/device/rocm/rocdevice.cpp).
VISIBILITY_VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that HIP would show, in HIP's order."""
    shown = list(gpus)
    rocr = environ.get("ROCR_VISIBLE_DEVICES")
    if rocr:
        shown = _picked(shown, rocr)
    listed = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES")
    return _picked(shown, listed) if listed else shown


def cut_off(listed: str, count: int) -> str | None:
    """The first entry of a visibility list that names none of `count` GPUs; it and all after it are dropped.

    An entry in the form of a unique id (`GPU-…`) cannot be judged from here and passes.
    """
    for entry in listed.split(","):
        word = entry.strip()
        if not (word.isdecimal() and int(word) < count) and not word.startswith("GPU-"):
            return word
    return None


def _picked(gpus: list[Gpu], listed: str) -> list[Gpu]:
    picked: list[Gpu] = []
    for entry in listed.split(","):
        word = entry.strip()
        if word.startswith("GPU-"):
            return gpus  # which one it is cannot be told without ROCr
        if not (word.isdecimal() and int(word) < len(gpus)):
            break
        picked.append(gpus[int(word)])
    return picked
