"""What tells who the owner of a machine is, and how it is taken out of a document before that leaves the machine."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from rocm_patch.settings import BACKENDS, LOG_LEVELS, POLICIES, START_METHODS, STRATEGY_NAMES


@dataclass(frozen=True)
class Private:
    """What tells who the owner of a machine is.

    Attributes:
        names: user names.
        hosts: host names.
        homes: home folders.
    """

    names: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()


# Accounts that name nobody, software, folders and words of ours: these go only where they name a home.
_WORDS = frozenset(
    """
    root user users rocm-patch admin administrator default guest nobody runner worker build builder jenkins ubuntu
    debian fedora arch linux docker container containers podman localhost localdomain desktop laptop workstation
    server node host home media mnt opt usr var tmp data etc bin lib src dev sys proc run srv work app python
    conda miniconda venv torch pytorch amd amdgpu radeon rocm rocr hsa hip miopen rocblas gpu gpus cpu cuda kfd
    dxg dri drm vram kernel driver conv convolution convolutions float test tests train report verify bench patch
    patches doctor ok failure failures warning warnings ticked failed private mac ip id email name names machine
    card cards version
    """.split()  # noqa: SIM905
) | {*POLICIES, *BACKENDS, *STRATEGY_NAMES, *START_METHODS, *LOG_LEVELS}
# English words that are names too: these go where they are part of a path, not from sentences.
_ENGLISH = frozenset(
    """
    will may mark the and for are not with from this that set all any max min true false none rich page plan sky art
    """.split()  # noqa: SIM905
)
# Keys whose values number one single device.
_DROPPED = re.compile(r"serial|(?:\w+_)?(?:unique_?id|uuid|serial|machine_id|boot_id)$", re.IGNORECASE)
_NAME = r"[^\s/\\:;,'\"()<>|\]}]+"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"(?<=://)[^\s/@]+@", "<private>@"),
        # Not `owner/repository@rocm-5.2.0`: the last label of a host has no digits.
        (r"(?<![\w.+%-])[\w.+%-]+@(?:[\w-]+\.)+(?:xn--[\w-]+|[^\W\d_]{2,})(?!\w)", "<email>"),
        (r"(?<![0-9a-z])(?<![0-9a-f][:-])(?:[0-9a-f]{2}[:-]){5,}[0-9a-f]{2}(?![0-9a-z])", "<mac>"),
        (r"\b(?:GPU-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\bGPU-[0-9a-f]{12,}\b", "<id>"),
        (r"(?<![0-9a-z])[0-9a-f]{32}(?![0-9a-z])", "<id>"),  # a machine id; commits have 40 digits
        (r"\b(unique[_ ]?id|uuid|serial(?:[_ ]?(?:number|no))?)\b(\W{1,3})(?=[\w-]*\d)[\w-]{6,}", r"\1\2<id>"),
    )
)
# Other people's homes; on other systems' disks a name can have a space.
_HOMES = re.compile(
    rf"([/\\]+(?:home|media)[/\\]+){_NAME}|"
    rf"([/\\]+(?:Users|Documents and Settings)[/\\]+){_NAME}(?:(?: {_NAME}){{1,2}}(?=[/\\]))?"
)
_IPV4 = re.compile(r"(?<![\d.])(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})(?!\d|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?:%\w+)?(?!\w)", re.IGNORECASE)
_SAYS_VERSION = re.compile(
    r"(?:version|release|rocm|hip|cuda|torch|cudnn|miopen|rocblas|driver|firmware|python|[=<>~!]=)\W{0,3}$", re.I
)
_SAYS_ADDRESS = re.compile(
    r"(?<!<)(?:addr|address|\bip|inet|host|server|peer|gateway|dns|connect(?:ed)? to)\W{0,3}$", re.I
)


def private_facts(environ: Mapping[str, str]) -> Private:
    """The names, host names and homes of this process's user."""
    names = [environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")]
    homes = [environ.get("HOME", ""), environ.get("USERPROFILE", "")]
    try:
        import pwd

        entry = pwd.getpwuid(os.getuid())
        names.append(entry.pw_name)
        homes.append(entry.pw_dir)
    except (ImportError, KeyError):  # Windows; a container's user without an entry
        pass
    homes += [os.path.realpath(home) for home in homes if home]
    homes = [home.rstrip("/\\") for home in homes]
    # The folder of a home is a name too, unless it lies at the top (/root, /app).
    names += [re.split(r"[/\\]", home)[-1] for home in homes if len(re.findall(r"[/\\]", home)) > 1]
    names += [part for name in names for part in re.split(r"[@\\]", name)]  # name@domain, DOMAIN\name
    hosts = [socket.gethostname(), environ.get("HOSTNAME", ""), environ.get("COMPUTERNAME", "")]
    hosts += [host.partition(".")[0] for host in hosts]
    return Private(
        *(tuple(sorted({*found} - {""}, key=lambda text: (-len(text), text))) for found in (names, hosts, homes))
    )


def scrubbed(value: Any, private: Private) -> Any:
    """A JSON value without what is private, and without keys that number one single device.

    Names go as whole words and parts of paths, never inside other words; a name that is a plain word of this field
    (`amd`, `root`) or very short goes only where it names a home. Versions and PCI addresses stay. The result
    scrubbed again is the same.
    """
    return _scrubbed(value, _rules(private), "")


def _scrubbed(value: Any, rules: Callable[[str, str], str], key: str) -> Any:
    if isinstance(value, str):
        return rules(value, key)
    if isinstance(value, Mapping):
        return {
            name if name.isidentifier() else rules(name, ""): _scrubbed(item, rules, name)
            for name, item in value.items()
            if not _DROPPED.match(name)
        }
    if isinstance(value, (list, tuple)):
        return [_scrubbed(item, rules, key) for item in value]
    return value


@cache
def _rules(private: Private) -> Callable[[str, str], str]:
    """What is done to a text, given the key under which it stands."""
    homes = [
        re.compile(rf"(?<![\w./~-]){re.escape(home)}(?![\w-]|\.\w)") for home in private.homes if home.strip("/")
    ]
    words = [(host, rf"{_whole(host)}(?:\.[\w-]+)*", "<host>") for host in private.hosts if _is_telling(host)]
    words += [(name, _whole(name), "<user>") for name in private.names if _is_telling(name)]
    words.sort(key=lambda word: -len(word[0]))
    replaced = [(re.compile(pattern, re.IGNORECASE), token) for _, pattern, token in words]

    def once(text: str, key: str) -> str:
        for pattern, token in _PATTERNS:
            text = pattern.sub(token, text)
        text = _IPV4.sub(lambda found: _ipv4(found, key), text)
        text = _IPV6.sub(_ipv6, text)
        for home in homes:
            text = home.sub("~", text)
        text = _HOMES.sub(lambda found: f"{found[1] or found[2]}<user>", text)
        for pattern, token in replaced:
            text = pattern.sub(token, text)
        return text

    def apply(text: str, key: str) -> str:
        # What is taken out can bare what stood behind it. Each round takes something out, so it ends.
        before = None
        while before != text:
            before, text = text, once(text, key)
        return text

    return apply


def _is_telling(name: str) -> bool:
    return name.lower() not in _WORDS and any(letter.isalpha() for letter in name)


def _whole(name: str) -> str:
    """The pattern of a name as a whole word, or as a whole part of a path where it could be another word."""
    if len(name) < 3 or name.lower() in _ENGLISH:
        return rf"(?<=[/\\]){re.escape(name)}(?![^/\\\s:;,'\")])"
    # In a longer name's folder, alice-data, the rest may stay; max_split_size is no folder of a Max.
    inside = r"[^\W_]" if len(name) > 3 else r"[\w-]"
    return rf"(?<!{inside}){re.escape(name)}(?!{inside})"


def _ipv4(found: re.Match[str], key: str) -> str:
    """An address is taken out, a version is not: both can be four numbers.

    No version of this field starts with a number over 31 (AMD's Windows driver has 31 and 32, the latter with
    parts over 255); 10 starts private addresses and may start versions. What stands beside decides the rest.
    """
    numbers = [int(part) for part in found.groups()]
    before, after = f"{key}={found.string[: found.start()]}", found.string[found.end() :]
    if max(numbers) > 255 or numbers[0] in (0, 127):
        return found[0]
    if numbers[0] > 31 or _SAYS_ADDRESS.search(before) or re.match(r":[\d/]|/\d{1,2}(?![\d.])", after):
        return "<ip>"
    is_part = re.search(r"[\w+-]$", before) or re.match(r"[\w+-]", after)
    return "<ip>" if numbers[0] == 10 and not is_part and not _SAYS_VERSION.search(before) else found[0]


def _ipv6(found: re.Match[str]) -> str:
    """C++ names (`c10::`) and PCI addresses look like parts of one; the addresses in use start with four digits."""
    import ipaddress

    for text in (found[0], found[0][:-1]):
        try:
            ipaddress.IPv6Address(text.partition("%")[0])
        except ValueError:
            continue
        if re.match(r"[0-9a-f]{4}:|::ffff:", text, re.IGNORECASE):
            return f"<ip>{found[0][len(text) :]}"
    return found[0]
