"""Who makes use of a scan: doctor, the plan of variables, the choice of a strategy."""

import json
from dataclasses import replace

from code_objects import triton
from conftest import MACHINES, rocm_patch
from rocm_patch.conv import DIRECT, IM2COL, NATIVE
from rocm_patch.conv.cases import CASES
from rocm_patch.machine import fit, hardware
from rocm_patch.machine.build import read_build
from rocm_patch.machine.environment import plan
from rocm_patch.machine.scan.scanning import Question, scan
from rocm_patch.settings import Settings
from rocm_patch.trust import choose
from rocm_patch.trust.choose import Chooser
from rocm_patch.trust.cleanliness import Cleanliness, blas_places
from rocm_patch.trust.fingerprint import Fingerprint

NAVI10 = Question("gfx1010", "10.3.0")


def test_no_override_that_the_scan_has_found_harmful(old_torch, own_environ, monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_CACHE_DIR", own_environ["ROCM_PATCH_CACHE_DIR"])
    root = str(MACHINES / "rx_5600_xt")
    machine, build, settings = hardware.read_machine(root), read_build(old_torch), Settings(sysfs_root=root)

    def planned(given):
        made = plan(machine, build, settings, given)
        return {c.name: c.value for c in made.changes if c.changes}, [str(n) for n in made.notices]

    assert planned({})[0][fit.OVERRIDE] == "10.3.0"
    scan([old_torch], NAVI10, own_environ)
    variables, notices = planned({})
    assert fit.OVERRIDE not in variables
    (notice,) = [text for text in notices if "cannot run safely on gfx1010" in text]
    assert "1 of its 1 kernels for gfx1030" in notice and "torch[device-gfx1010]" in notice
    # What the user sets stays, and the document's own settings are there for whoever asks for them.
    assert planned({fit.OVERRIDE: "10.3.0"})[0].get(fit.OVERRIDE) is None
    document = plan(machine, build, Settings(sysfs_root=root, profile="document"), {})
    assert (fit.OVERRIDE, "10.3.0") in [(c.name, c.value) for c in document.changes]


def test_an_override_that_the_scan_has_nothing_against_stays(old_torch, own_environ, monkeypatch):
    monkeypatch.setenv("ROCM_PATCH_CACHE_DIR", own_environ["ROCM_PATCH_CACHE_DIR"])
    root = str(MACHINES / "rx_6700_xt")
    scan([old_torch], Question("gfx1031", "10.3.0"), own_environ)
    made = plan(hardware.read_machine(root), read_build(old_torch), Settings(sysfs_root=root), {})
    assert (fit.OVERRIDE, "10.3.0") in [(change.name, change.value) for change in made.changes]


def doctor(old_torch, own_environ):
    shown = rocm_patch(
        "doctor", "--json", check=False, PYTHONPATH=str(old_torch.parent),
        ROCM_PATCH_SYSFS_ROOT=str(MACHINES / "rx_5600_xt"), **own_environ,
    )  # fmt: skip
    findings = json.loads(shown.stdout)["findings"]
    return [finding for finding in findings if finding["check"] == "scanned_code"]


def test_doctor_reports_both_answers(old_torch, own_environ):
    (first,) = doctor(old_torch, own_environ)
    assert first["level"] == "ok" and first["fix"] == "rocm-patch scan"
    assert "has not been scanned" in first["summary"]
    scan([old_torch], NAVI10, own_environ)
    served, harmful = doctor(old_torch, {**own_environ, fit.OVERRIDE: "10.3.0"})
    assert "another chip's, under HSA_OVERRIDE_GFX_VERSION: libtorch_hip.so, rocBLAS kernels" in served["summary"]
    assert harmful["level"] == "warning"
    assert "2 of 2 kernels for gfx1030 cannot run safely on gfx1010" in harmful["summary"]
    assert "torch[device-gfx1010]" in harmful["fix"]
    # Found harmful, the override is planned no more: each library's own code counts where it has some.
    served, *rest = doctor(old_torch, own_environ)
    assert "native for gfx1010: rocBLAS kernels" in served["summary"]
    assert {(finding["level"], finding["summary"][:21]) for finding in rest} == {
        ("warning", "1 of 1 kernels for gf"), ("ok", "gfx1010: nothing is k"),
    }  # fmt: skip


def strategies():
    """Out of real machine code: a fast one that gfx1010 cannot run safely, and a slow one that is clean."""
    code = triton()
    fast = replace(IM2COL, name="fast", uses_blas=False, machine_code=lambda spec: (code["gfx1030"],))
    slow = replace(IM2COL, name="slow", uses_blas=False, machine_code=lambda spec: (code["gfx1010"],))
    return fast, slow


def fingerprint(device):
    return Fingerprint("gfx1010", "10.3.0", "1.13.1+rocm5.2", "hip 5.2", "", "")


def test_choose_prefers_what_the_card_can_run(monkeypatch, old_torch, own_environ):
    case = CASES[0].spec("forward", "float32", "cpu", False)
    fast, slow = strategies()
    monkeypatch.setattr(choose, "likeliest", lambda spec: [fast, slow])
    chooser = Chooser("bypass", timed=lambda spec: {"fast": 1.0, "slow": 2.0})
    assert chooser.choose(case).strategy is fast
    known = Cleanliness(fingerprint, read_build(old_torch), own_environ)
    chooser.is_clean = known.of
    assert (known.of(case, fast), known.of(case, slow)) == (False, True)
    choice = chooser.choose(case)
    assert choice.strategy is slow
    assert "others run code that this card cannot run safely: fast" in choice.why
    # The user's word comes first.
    chosen = Chooser("bypass", "im2col", timed=chooser.timed, is_clean=known.of)
    fast_by_name = strategies()[0]
    monkeypatch.setattr(chosen, "preferred", "fast")
    assert chosen.choose(case).strategy.name == fast_by_name.name


def test_code_that_is_compiled_meanwhile_is_judged_when_it_is_ready(monkeypatch, old_torch, own_environ):
    case = CASES[0].spec("forward", "float32", "cpu", False)
    fast, slow = strategies()
    ready = []

    def is_ready(spec, wait):
        ready.append(spec)
        return True

    late = replace(fast, is_ready=is_ready, machine_code=lambda spec: fast.machine_code(spec) if ready else None)
    monkeypatch.setattr(choose, "likeliest", lambda spec: [late, slow])
    known = Cleanliness(fingerprint, read_build(old_torch), own_environ)
    chooser = Chooser("bypass", timed=lambda spec: {"fast": 1.0, "slow": 2.0}, is_clean=known.of)
    assert chooser.choose(case).strategy is slow


def test_the_blas_library_counts_once_it_is_scanned(old_torch, own_environ):
    case = CASES[0].spec("forward", "float32", "cpu", False)
    build = read_build(old_torch)
    assert Cleanliness(fingerprint, build, own_environ).of(case, IM2COL) is None
    scan(blas_places(build), NAVI10, own_environ)
    known = Cleanliness(fingerprint, build, own_environ)
    assert known.of(case, IM2COL) is False
    assert known.of(case, NATIVE) is None
    assert not DIRECT.uses_blas and known.of(case, DIRECT) is None  # not compiled
    other = Cleanliness(lambda device: Fingerprint("gfx1100", "", "", "", "", ""), build, own_environ)
    assert other.of(case, IM2COL) is None
