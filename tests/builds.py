"""torch installations and the like as files, for tests that read them."""

import struct
from pathlib import Path

from rocm_patch.machine.build import read_build


def bundle(*targets, host=True, code=64):
    """A clang offload bundle with nothing for these targets."""
    return bundle_of({target: bytes(code) for target in targets}, host)


def bundle_of(code, host=True):
    """A clang offload bundle in its documented layout: magic, count, rows of offset, size, name; then the code."""
    rows = [(b"host-x86_64-unknown-linux--", b"")] * host
    rows += [(b"hipv4-amdgcn-amd-amdhsa--" + target.encode(), content) for target, content in code.items()]
    table = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", len(rows))
    place, body = 4096, b""
    for name, content in rows:
        table += struct.pack("<QQQ", place + len(body), len(content), len(name)) + name
        body += content.ljust(-(-len(content) // 4096) * 4096, b"\0") if len(rows) > 1 else content
    whole = table.ljust(place, b"\0") + body
    return whole.ljust(-(-len(whole) // 4096) * 4096, b"\0")


def torch_folder(root, version, hip=None, cuda=None, targets=(), python="3.11", numpy=None, rocblas=(), miopen=()):
    """A torch package as pip lays it out, with device code for `targets`; its folder."""
    site = Path(root) / f"lib/python{python}/site-packages"
    folder = site / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = {version!r}\ndebug = False\n"
        f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\n"
    )
    (folder / "__init__.py").write_text("from torch.version import __version__\n")
    if hip:
        (folder / "lib/libtorch_hip.so").write_bytes(bundle(*targets) if targets else b"\x7fELF")
    if numpy:
        (site / f"numpy-{numpy}.dist-info").mkdir()
    for place, names in (("lib/rocblas/library", rocblas), ("share/miopen/db", miopen)):
        for name in names:
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / name).touch()
    return folder


def torch_build(root, version, hip=None, cuda=None, targets=(), **more):
    """The same, read."""
    return read_build(torch_folder(root, version, hip, cuda, targets, **more))
