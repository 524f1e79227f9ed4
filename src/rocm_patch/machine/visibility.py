"""Which GPUs the user's own variables leave visible, as ROCr, HIP and torch read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rocm_patch.machine.hardware import Gpu

# ROCr's filter comes first and renumbers; an empty one hides all. HIP's own comes before CUDA's, which counts where
# HIP's is empty (ROCr runtime.cpp; ROCm/clr rocclr/device/rocm/rocdevice.cpp).
VISIBILITY_VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def chosen(environ: Mapping[str, str]) -> bool:
    """Whether the user has chosen which GPUs to see."""
    return "ROCR_VISIBLE_DEVICES" in environ or bool(_hip_list(environ))


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that HIP would show, in HIP's order."""
    shown = kept_by_rocr(gpus, environ)
    listed = _hip_list(environ)
    return _picked(shown, listed) if listed else shown


def kept_by_rocr(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that HIP counts among: those that ROCm finds here and that `ROCR_VISIBLE_DEVICES` leaves."""
    found = [gpu for gpu in gpus if gpu.thunk_node is not None] or list(gpus)
    listed = environ.get("ROCR_VISIBLE_DEVICES")
    return found if listed is None else _picked(found, listed)


def cut_off(listed: str, count: int) -> str | None:
    """The first entry of a visibility list that names none of `count` GPUs; it and all after it are dropped.

    An entry in the form of a unique id (`GPU-…`) cannot be judged from here and passes; so does -1, which is the
    way to hide all.
    """
    for entry in listed.split(","):
        word = entry.strip()
        if not (word.isdecimal() and int(word) < count) and not word.startswith("GPU-") and word != "-1":
            return word
    return None


def _hip_list(environ: Mapping[str, str]) -> str:
    return environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES") or ""


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
