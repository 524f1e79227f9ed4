"""Which GPU targets the device code in a shared library is for, read from the file alone.

A HIP library holds its device code in the ELF section `.hip_fatbin`: clang offload bundles one after another, each
with a table of the targets in it (https://clang.llvm.org/docs/ClangOffloadBundler.html). Only these tables are read,
through a memory map, so a library of several GB costs a few hundred page reads. What was read is kept in the cache
folder under the file's identity.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from pathlib import Path

from rocm_patch.machine.folders import cache_folder
from rocm_patch.machine.scan import bundles, elf
from rocm_patch.settings import LOGGER

# What torch itself answers to torch.cuda.get_arch_list(), a constant of the build.
_ARCH_LIST = re.compile(rb"gfx[0-9a-f]{3,4}(?:[ ;]gfx[0-9a-f]{3,4})+(?=\x00)")
# Sections that can hold the build's list of targets; the others of a torch library are GBs of kernels.
_TEXT_SECTIONS = (".rodata", ".rodata.str1.1", ".rodata.str1.8")


def targets_of(library: Path) -> frozenset[str]:
    """The gfx targets that a library has device code for, without features: `gfx90a:xnack-` counts as `gfx90a`.

    Generic targets appear under their own names, `gfx10-1-generic`. Bundles compressed with zstd are read where
    Python can (3.14 on, or with `backports.zstd`); otherwise the list of targets that torch was built with
    stands in. Empty where nothing can be read.

    Raises:
        OSError: the file cannot be opened.
    """
    with library.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return frozenset()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # The tables lie MBs apart: reading ahead would read the whole library.
            content.madvise(mmap.MADV_RANDOM)
            sections = elf.sections(content)
            fat = [(s.start, s.start + s.size) for s in sections if s.name.startswith(".hip_fatbin")]
            found: set[str] = set()
            for start, end in fat if sections else [(0, len(content))]:
                found |= _targets(content, start, end)
            if not found:
                content.madvise(mmap.MADV_NORMAL)
                for section in sections:
                    if section.name in _TEXT_SECTIONS:
                        for listed in _ARCH_LIST.finditer(content, section.start, section.start + section.size):
                            found.update(target.decode() for target in re.split(rb"[ ;]", listed[0]))
    return frozenset(found)


def _targets(content: mmap.mmap, start: int, end: int) -> set[str]:
    """The targets that the bundles between two offsets name in their heads."""
    found: set[str] = set()
    for bundle in bundles.bundles(content, start, end):
        found.update(entry.target for entry in bundle.entries or ())
    return found - {"amdgcnspirv"}


def cached_targets_of(library: Path) -> frozenset[str]:
    """`targets_of`, remembered in the cache folder under the file's path, size, inode and time.

    Raises:
        OSError: the file cannot be opened.
    """
    status = library.stat()
    identity = f"{library}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    store = cache_folder(os.environ) / "device_code.json"
    known = _read_store(store)
    if identity in known:
        return frozenset(known[identity])
    found = targets_of(library)
    if not found:  # another Python, or another version of us, may read more
        return found
    # One entry for each path: an upgraded library takes its predecessor's place.
    kept = {key: value for key, value in known.items() if not key.startswith(f"{library}|")}
    _write_store(store, {**kept, identity: sorted(found)})
    return found


def _read_store(store: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        return {str(key): [str(item) for item in value] for key, value in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or spoilt: it is read from the library again
        return {}


def _write_store(store: Path, content: dict[str, list[str]]) -> None:
    beside = store.with_name(f"{store.name}.{os.getpid()}")
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(content), encoding="utf-8")
        beside.replace(store)
    except OSError as error:
        LOGGER.debug("cannot keep %s: %s", store, error)
