"""`rocm-patch doctor` on machines with one thing wrong each, and on one where nothing is.

A machine is a tree that stands for `/`, a torch installation, and an environment; the command runs as a user runs it.
"""

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builds import torch_folder
from conftest import MACHINES, clean_environ
from rocm_patch.machine.hardware import read_machine
from rocm_patch.settings import Settings
from rocm_patch.tools.doctor import driver
from rocm_patch.tools.doctor.finding import Context
from rocm_patch.trust.fingerprint import Fingerprint
from rocm_patch.trust.store import Store, Verdict

LIST_1_13 = ("gfx900", "gfx906", "gfx908", "gfx90a", "gfx1030")
LIST_2_4 = (*LIST_1_13, "gfx942", "gfx1100")
# What the fake torch says when doctor asks it.
SEES_ONE = """
from torch.version import __version__
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda place: "AMD Radeon")
"""
CLEAN_LOG = "6,1000,5000000,-;amdgpu 0000:03:00.0: amdgpu: SMU is initialized successfully!\n"


@dataclass
class Stage:
    """A machine: change what is in `root`, `torch`, `environ` before `examine`."""

    root: Path
    site: Path
    environ: dict = field(default_factory=dict)

    def write(self, path, text, mode="w"):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or target.is_file():
            target.unlink()
        target.write_text(text)

    def torch(self, version="2.9.1+rocm6.4", hip="6.4", cuda=None, targets=LIST_2_4, says=SEES_ONE, **more):
        """Put another torch in the place of the one that is there."""
        shutil.rmtree(self.root / "lib", ignore_errors=True)
        folder = torch_folder(self.root, version, hip, cuda, targets, **more)
        (folder / "__init__.py").write_text(says)
        self.site = folder.parent
        return folder

    def in_mounts(self, line):
        self.write("proc/mounts", (self.root / "proc/mounts").read_text() + line + "\n")

    def findings(self, before="", *options):
        environ = clean_environ(
            ROCM_PATCH_SYSFS_ROOT=str(self.root), PYTHONPATH=str(self.site), HOME="/home/ann", **self.environ
        )
        if "ROCM_PATCH_CACHE_DIR" not in self.environ:
            del environ["ROCM_PATCH_CACHE_DIR"]
        environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
        environ.pop("XDG_CACHE_HOME", None)
        script = f"{before}\n{sys.executable} -m rocm_patch doctor --json {' '.join(options)}"
        done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=120)
        assert done.stdout, done.stderr
        found = json.loads(done.stdout)["findings"]
        assert done.returncode == any(f["level"] == "failure" for f in found), done.stderr
        return found


def stage(tmp_path, machine="rx_7900_xtx"):
    """A machine where nothing is wrong."""
    shutil.copytree(MACHINES / machine, tmp_path, dirs_exist_ok=True, symlinks=True)
    staged = Stage(tmp_path, tmp_path)
    staged.torch()
    staged.write("dev/kmsg", CLEAN_LOG)
    staged.write("etc/passwd", f"root:x:0:0::/root:/bin/sh\nann:x:{os.getuid() or 1000}:1000::/home/ann:/bin/sh\n")
    staged.write("etc/group", "root:x:0:\nvideo:x:44:\nrender:x:105:\n")
    staged.write("proc/self/limits", "Max open files            1048576    1048576    files\n"
                 "Max locked memory         unlimited  unlimited  bytes\n")  # fmt: skip
    (tmp_path / "home/ann").mkdir(parents=True, exist_ok=True)
    return staged


def wrong(findings):
    return [finding for finding in findings if finding["level"] != "ok"]


@pytest.mark.parametrize("machine", ["rx_7900_xtx", "mi210", "mi100", "cpu_only", "nvidia"])
def test_nothing_is_wrong_on_a_healthy_machine(tmp_path, machine):
    staged = stage(tmp_path, machine)
    if machine in ("cpu_only", "nvidia"):
        staged.torch("2.13.0+cpu", hip=None)
    findings = staged.findings()
    assert wrong(findings) == []
    checks = {finding["check"] for finding in findings}
    assert {"torch_build", "shared_memory", "limits", "folders", "convolutions"} <= checks
    if machine == "rx_7900_xtx":
        assert {
            "kernel_driver",
            "gpus",
            "device_access",
            "device_code",
            "versions",
            "kernel_log",
            "seen_by_torch",
        } <= checks


@pytest.mark.parametrize("lacking", ["", "dev/dri/renderD128", "dev/kfd", "sys/class/kfd"])
@pytest.mark.parametrize(("version", "cuda"), [("2.13.0+cu130", "13.0"), ("2.13.0+cpu", None)])
def test_an_nvidia_machine_with_an_integrated_amd_gpu(tmp_path, lacking, version, cuda):
    staged = stage(tmp_path, "granite_ridge")
    staged.torch(version, hip=None, cuda=cuda)
    device = "sys/bus/pci/devices/0000:01:00.0"
    for name, text in (("vendor", "0x10de"), ("device", "0x2204"), ("class", "0x030000")):
        staged.write(f"{device}/{name}", text)
    if lacking == "sys/class/kfd":
        shutil.rmtree(tmp_path / lacking)
        (tmp_path / "dev/kfd").unlink()
    elif lacking:
        (tmp_path / lacking).unlink()
    staged.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    assert wrong(staged.findings()) == []


def test_an_integrated_gpu_alone_with_a_native_build(tmp_path):
    staged = stage(tmp_path, "granite_ridge")
    (staged.torch("2.12.0+rocm7.14.0", "7.14", targets=("gfx1036",)).parent / "_rocm_sdk_core").mkdir()
    assert wrong(staged.findings()) == []


def test_a_container_with_one_of_two_gpus(tmp_path):
    staged = stage(tmp_path, "rx_6600_and_raphael")
    (staged.torch("2.12.0+rocm7.14.0", "7.14", targets=("gfx1032",)).parent / "_rocm_sdk_core").mkdir()
    (tmp_path / "dev/dri/renderD129").unlink()
    findings = staged.findings()
    assert wrong(findings) == []
    assert any("gfx1036" in f["summary"] and "hidden" in f["summary"] for f in findings)


@pytest.mark.parametrize("version", ["2.12.0+rocm7.14.0", "2.9.1+rocm7.2.4.git39497456"])
def test_a_build_of_amds_own_is_no_mistake(tmp_path, version):
    staged = stage(tmp_path)
    site = staged.torch(version, "7.2", numpy="2.1.0").parent
    (site / "_rocm_sdk_core").mkdir()
    assert wrong(staged.findings()) == []


# One thing wrong each: what is done to the machine; the check, level and words that must be found; whether the fix
# can be run here, in which case the finding must be gone after it.
FAULTS = {}


def fault(check, level, words, machine="rx_7900_xtx", *, run_fix=False, fix=""):
    def record(change):
        FAULTS[change.__name__] = (change, machine, check, level, words, run_fix, fix)
        return change

    return record


@fault("torch_build", "failure", "cuda build", fix="https://download.pytorch.org/whl/rocm")
def a_cuda_build(staged):
    staged.torch("2.13.0+cu130", hip=None, cuda="13.0")


@fault("torch_build", "failure", "cpu build", "rx_5600_xt", fix="torch[device-gfx1010]")
def a_cpu_build(staged):
    staged.torch("2.13.0+cpu", hip=None)


@fault("torch_build", "warning", "has no torch", fix="python -m pip install")
def a_torch_that_is_none(staged):
    (staged.torch() / "version.py").unlink()


@fault("device_code", "failure", "no code that gfx1010 can run", "rx_5600_xt", fix="torch[device-gfx1010]")
def an_rdna1_card_with_a_new_torch(staged):
    staged.torch("2.6.0+rocm6.1", "6.1")


@fault("device_code", "warning", "10.3.0", "rx_6700_xt", fix="torch[device-gfx1031]")
def a_native_wheel_outranks_the_override(staged):
    pass


@fault("environment", "warning", "not needed", run_fix=True, fix="unset HSA_OVERRIDE_GFX_VERSION")
def an_override_that_is_not_needed(staged):
    staged.environ["HSA_OVERRIDE_GFX_VERSION"] = "10.3.0"


@fault("environment", "failure", "crash", "radeon_780m", run_fix=True)
def an_override_that_crashes(staged):
    staged.environ["HSA_OVERRIDE_GFX_VERSION"] = "11.0.0"


@fault("environment", "warning", "0 stay visible", run_fix=True)
def a_hidden_card(staged):
    staged.environ["HIP_VISIBLE_DEVICES"] = "1"


@fault("environment", "warning", "AMD_LOG_LEVEL=4 is left set", run_fix=True)
def a_debugging_variable_left_set(staged):
    staged.environ["AMD_LOG_LEVEL"] = "4"


@fault("environment", "warning", "does not know this value", run_fix=True)
def a_value_that_miopen_does_not_know(staged):
    staged.environ["MIOPEN_FIND_MODE"] = "QUICK"


@fault("kernel_driver", "failure", "has no driver", "no_driver", fix="sudo modprobe amdgpu")
def a_card_without_driver(staged):
    pass


@fault("kernel_driver", "warning", "vfio-pci", "rx_5600_xt")
def a_card_given_to_a_virtual_machine(staged):
    shutil.rmtree(staged.root / "sys/class/kfd/kfd/topology/nodes/1")
    (staged.root / "dev/kfd").unlink()
    link = staged.root / "sys/bus/pci/devices/0000:03:00.0/driver"
    link.unlink()
    link.symlink_to("../../../bus/pci/drivers/vfio-pci")


@fault("kernel_driver", "warning", "not a compute device", "rx_5600_xt", fix="sudo dmesg | grep -i kfd")
def a_card_that_the_compute_driver_skips(staged):
    shutil.rmtree(staged.root / "sys/class/kfd/kfd/topology/nodes/1")


@fault("kernel_driver", "failure", "no /dev/kfd", "rx_5600_xt", fix="--device=/dev/kfd")
def a_container_without_the_device(staged):
    shutil.rmtree(staged.root / "sys/class/kfd")
    (staged.root / "dev/kfd").unlink()
    staged.write(".dockerenv", "")


@fault("kernel_driver", "warning", "is old for gfx1151", "strix_halo")
def an_old_kernel(staged):
    staged.write("proc/sys/kernel/osrelease", "6.14.0-15-generic")


@fault("device_access", "failure", "renderD128 is not here")
def a_missing_render_node(staged):
    (staged.root / "dev/dri/renderD128").unlink()


@fault("gpus", "warning", "cannot be read")
def a_masked_node(staged):
    (staged.root / "sys/class/kfd/kfd/topology/nodes/2").mkdir()


@fault("gpus", "failure", "lists no AMD GPU", "cpu_node_only")
def a_driver_without_a_card(staged):
    pass


@fault("pcie_atomics", "warning", "no PCIe atomics", "rx_5600_xt")
def a_slot_without_atomics(staged):
    link = "sys/class/kfd/kfd/topology/nodes/1/io_links/0/properties"
    staged.write(link, "type 2\nflags 13\n")


@fault("integrated", "warning", "device 0 is the integrated gfx1036", "raphael_and_rx_7600", run_fix=True,
       fix="export HIP_VISIBLE_DEVICES=1")  # fmt: skip
def the_integrated_gpu_first(staged):
    staged.torch(targets=("gfx1036", "gfx1102"), version="2.13.0+rocm7.2", hip="7.2")


@fault("versions", "failure", "NumPy 2.1.0", "rx_5600_xt", fix="python -m pip install 'numpy<2'")
def numpy_2_with_an_old_torch(staged):
    staged.torch("1.13.1+rocm5.2", "5.2.21151", targets=LIST_1_13, numpy="2.1.0")


@fault("versions", "warning", "ROCm 5.2")
def a_pair_that_was_never_published(staged):
    staged.torch("2.6.0+rocm5.2", "5.2", numpy="1.26.4")


@fault("versions", "warning", "not 3.13", "rx_5600_xt")
def a_python_that_the_torch_was_not_made_for(staged):
    staged.torch("1.13.1+rocm5.2", "5.2.21151", targets=LIST_1_13, python="3.13", numpy="1.26.4")


@fault("libraries", "failure", "no kernels for gfx1100")
def a_rocblas_without_the_card(staged):
    staged.torch(rocblas=["TensileLibrary_lazy_gfx900.dat", "TensileLibrary_lazy_gfx1030.dat"])


@fault("libraries", "warning", "LD_LIBRARY_PATH puts", run_fix=True)
def two_rocm_versions(staged):
    (staged.site / "torch/lib/libamdhip64.so").symlink_to("/dev/null")
    other = staged.root / "opt/other/lib"
    other.mkdir(parents=True)
    (other / "libamdhip64.so.5").touch()
    staged.environ["LD_LIBRARY_PATH"] = str(other)


@fault("seen_by_hip", "failure", "gives no answer")
def a_broken_hip_library(staged):
    (staged.site / "torch/lib/libamdhip64.so").write_bytes(b"\x7fELF and nothing else")


@fault("seen_by_torch", "failure", "sees no GPU")
def a_torch_that_sees_no_gpu(staged):
    staged.torch(says=SEES_ONE.replace("True", "False"))


@fault("seen_by_torch", "failure", "killed by signal 11")
def a_torch_that_crashes(staged):
    staged.torch(says="import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")


@fault("container", "warning", "goes with the container", fix="docker run -v rocm-patch-cache:")
def a_container_that_is_thrown_away(staged):
    staged.write(".dockerenv", "")
    staged.write("proc/mounts", "overlay / overlay rw 0 0\ntmpfs /dev/shm tmpfs rw,size=8388608k 0 0\n")


@fault("shared_memory", "warning", "/dev/shm has 64 MiB", fix="docker run --shm-size")
def a_small_dev_shm(staged):
    staged.write(
        "proc/mounts",
        "/dev/sda1 / ext4 rw 0 0\nshm /dev/shm tmpfs rw,nosuid,size=65536k 0 0\n/dev/sdb1 /home ext4 rw 0 0\n",
    )
    staged.write(".dockerenv", "")


@fault("limits", "warning", "64 KiB", "two_cards")
def little_memory_to_lock(staged):
    staged.write("proc/self/limits", "Max locked memory         65536      65536      bytes\n")


@fault("limits", "warning", "may open 256 files")
def few_files_to_open(staged):
    staged.write("proc/self/limits", "Max open files            256        4096       files\n")


@fault("folders", "warning", "rocm-patch cannot be written", run_fix=True)
def a_cache_that_cannot_be_written(staged):
    shutil.rmtree(staged.root / "home")
    staged.write("home", "a file, so nobody can make a folder below it")


@fault("folders", "warning", "rocm-patch lies on nfs4", run_fix=True, fix="export ROCM_PATCH_CACHE_DIR=")
def a_cache_on_the_network(staged):
    staged.in_mounts("server:/home /home nfs4 rw 0 0")


@fault("folders", "warning", "the home folder /home/ann lies on cifs", run_fix=True, fix="rocm-patch env")
def a_home_on_the_network(staged):
    staged.environ["ROCM_PATCH_CACHE_DIR"] = "/var/tmp/ours"
    staged.in_mounts("//server/home /home cifs rw 0 0")


@fault("kernel_log", "warning", "ring gfx")
def a_fault_in_the_kernel_log(staged):
    staged.write("dev/kmsg", CLEAN_LOG + "3,1201,95000000,-;amdgpu 0000:03:00.0: amdgpu: ring gfx_0.0.0 timeout, "
                 "signaled seq=1234, emitted seq=1236\n")  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults(tmp_path, name):
    change, machine, check, level, words, run_fix, fix = FAULTS[name]
    staged = stage(tmp_path, machine)
    change(staged)

    def found(before=""):
        return [
            finding for finding in wrong(staged.findings(before))
            if finding["check"] == check and words in finding["summary"] + finding["why"]
        ]  # fmt: skip

    (finding,) = found()
    assert finding["level"] == level
    assert fix in finding["fix"] and finding["why"]
    # Every fix is a shell command.
    subprocess.run(["bash", "-n", "-c", finding["fix"]], check=True)
    if run_fix:
        assert found(finding["fix"]) == []


def test_at_least_twenty_faults_are_staged():
    assert len(FAULTS) >= 20 and sum(run_fix for *_, run_fix, _ in FAULTS.values()) >= 8


def test_a_limit_of_the_real_session():
    def few(before):
        script = f"ulimit -S -n 512; {before} {sys.executable} -m rocm_patch doctor --json"
        done = subprocess.run(
            ["bash", "-c", script], env=clean_environ(), capture_output=True, text=True, timeout=120
        )
        return [f for f in json.loads(done.stdout)["findings"] if "may open 512" in f["summary"]]

    (finding,) = few("")
    assert few(finding["fix"] + ";") == []


# Permissions: who this process is decides, so it becomes somebody else for a moment.


@pytest.fixture
def open_folder():
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def access(folder, groups, members="", container=False, mode=0o660):
    staged = stage(folder)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    staged.write("etc/group", f"video:x:44:\nrender:x:105:{members}\n")
    staged.write("etc/passwd", "ann:x:65533:65533::/home/ann:/bin/sh\n")
    if container:
        staged.write(".dockerenv", "")
    for device in (folder / "dev/kfd", folder / "dev/dri/renderD128"):
        os.chown(device, 0, 105)
        device.chmod(mode)
    context = Context(read_machine(str(folder)), sys.executable, None, Settings(sysfs_root=str(folder)), {})
    before = os.getgroups()
    os.setgroups(groups)
    os.setresuid(65533, 65533, 0)
    try:
        return list(driver.device_access(context))
    finally:
        os.setresuid(0, 0, 0)
        os.setgroups(before)


needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="not on this machine: root, who alone can become another user"
)


@needs_root
def test_a_user_outside_the_group(open_folder):
    kfd, render = access(open_folder, [])
    assert kfd.level == render.level == "failure" and "group render" in kfd.summary
    assert kfd.fix == "sudo usermod -aG render,video ann"


@needs_root
def test_a_user_who_must_log_in_again(open_folder):
    kfd, _ = access(open_folder, [44], members="bob,ann")
    assert kfd.fix == "newgrp render" and "does not know it yet" in kfd.why


@needs_root
def test_a_container_without_the_group(open_folder):
    kfd, _ = access(open_folder, [], container=True)
    assert "--group-add 105" in kfd.fix


@needs_root
def test_a_device_that_no_group_may_open(open_folder):
    kfd, _ = access(open_folder, [105], mode=0o600)
    assert kfd.fix.startswith("echo 'KERNEL==") and "usermod" not in kfd.fix
    subprocess.run(["bash", "-n", "-c", kfd.fix], check=True)


@needs_root
def test_a_user_in_the_group(open_folder):
    (finding,) = access(open_folder, [105])
    assert finding.level == "ok" and "2 device nodes can be opened by ann" in finding.summary


def test_a_node_that_nobody_may_open(tmp_path):
    staged = stage(tmp_path)
    kfd = tmp_path / "dev/kfd"
    kfd.unlink()
    kfd.symlink_to("/proc/self/nonexistent")  # there by name, but not to be opened by anybody, root included
    context = Context(read_machine(str(tmp_path)), "", None, Settings(sysfs_root=str(tmp_path)), {})
    assert not context.machine.kfd
    assert "kernel_driver" not in {f["check"] for f in wrong(staged.findings()) if f["level"] == "failure"}


HIP = ctypes.util.find_library("amdhip64")


@pytest.mark.skipif(HIP is None, reason="not on this machine: a HIP runtime (Debian: libamdhip64-5)")
def test_the_real_hip_runtime_says_that_it_has_no_device(tmp_path):
    staged = stage(tmp_path)
    (staged.site / "torch/lib/libamdhip64.so").symlink_to(next(Path("/usr/lib/x86_64-linux-gnu").glob(HIP)))
    (finding,) = [f for f in staged.findings() if f["check"] == "seen_by_hip"]
    assert finding["level"] == "failure" and "HIP sees 0 GPUs" in finding["summary"]


def test_a_check_that_fails_is_a_finding(tmp_path):
    staged = stage(tmp_path)
    store = tmp_path / "lib/python3.11/site-packages/torch/lib/libtorch_hip.so"
    store.unlink()
    store.symlink_to(store.name)  # a loop: is not a file, so nothing is read
    assert wrong(staged.findings()) == []
    script = "import rocm_patch.tools.doctor as d\ndef boom(context): raise OSError('the disk is gone')\n"
    script += (
        "d.CHECKS = (boom, *d.CHECKS)\nfrom rocm_patch.settings import Settings\nprint(d.examine(Settings())[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environ(), capture_output=True, text=True, check=True
    )
    assert "boom" in done.stdout and "the disk is gone" in done.stdout and "rocm-patch report" in done.stdout


# A log, a script.


def doctor(*arguments, input=None, **environ):
    command = [sys.executable, "-m", "rocm_patch", "doctor", *arguments]
    return subprocess.run(
        command, env=clean_environ(**environ), input=input, capture_output=True, text=True, timeout=60
    )


def test_a_log_from_standard_input():
    done = doctor(
        "-", "--json", input="RuntimeError: DataLoader worker (pid 41) exited unexpectedly with exit code 1.\n"
    )
    assert done.returncode == 0
    (finding, *_) = json.loads(done.stdout)["findings"]
    assert finding["level"] == "warning" and "worker" in finding["summary"] and finding["why"]
    assert (
        doctor("-", "--strict", input="RuntimeError: DataLoader worker (pid 41) exited unexpectedly\n").returncode
        == 1
    )
    assert "none of the" in doctor("-", input="Epoch 1: loss 0.3\n").stdout


def test_a_log_that_is_not_there(tmp_path):
    for path in (tmp_path / "missing.log", tmp_path):
        done = doctor(str(path))
        assert done.returncode == 2 and "hint:" in done.stderr and str(path) in done.stderr


def test_a_script_that_sets_its_variables_too_late(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os\nos.environ['HSA_XNACK'] = '0'\nimport torch\n"
        "os.environ['HSA_OVERRIDE_GFX_VERSION'] = '10.3.0'\nos.environ.setdefault('MIOPEN_FIND_MODE', 'FAST')\n"
        "os.environ['OMP_NUM_THREADS'] = '1'\n"
    )
    found = json.loads(doctor(str(script), "--json").stdout)["findings"]
    assert [f["check"] for f in found] == ["late_settings"] * 2
    assert "line 4: HSA_OVERRIDE_GFX_VERSION" in found[0]["summary"] and f"check {script}" in found[0]["fix"]
    script.write_text("import os\nos.environ['HSA_XNACK'] = '0'\nimport torch\n")
    assert "no variable too late" in doctor(str(script)).stdout
    script.write_text("import os, torch\nos.environ['PYTORCH_MIOPEN_SUGGEST_NHWC'] = '1'\n")
    assert "no variable too late" in doctor(str(script)).stdout
    script.write_text("import os\ndef main():\n    import torch\nos.environ['HSA_XNACK'] = '0'\nmain()\n")
    assert "no variable too late" in doctor(str(script)).stdout
    script.write_text("import os, torch\nos.environ.update({'HSA_XNACK': '0'})\nos.environ |= {'HSA_USE_SVM': '0'}\n")
    assert doctor(str(script)).stdout.count("is set after torch") == 2
    script.write_text("import os (")
    assert doctor(str(script)).returncode == 1


def test_text_and_json_say_the_same(tmp_path):
    staged = stage(tmp_path, "rx_6700_xt")
    staged.environ["ROCM_PATCH_CACHE_DIR"] = "/home/ann/learned"
    environ = {"ROCM_PATCH_SYSFS_ROOT": str(tmp_path), "PYTHONPATH": str(staged.site), "HOME": "/home/ann"}
    text = doctor(**environ, **staged.environ).stdout
    for finding in staged.findings():
        assert f"{finding['level']:<8} {finding['check']}: {finding['summary']}" in text
        assert finding["fix"] in text


# What has failed here before -------------------------------------------------------------------------------------


def recorded(tmp_path, *failures, torch="2.6.0+rocm6.2.4", kernel=None):
    """doctor's findings on a card where these (strategy, verdict) are recorded."""
    staged = stage(tmp_path, "rx_5700_xt")
    staged.torch(torch, targets=["gfx1030"])
    machine = read_machine(str(tmp_path))
    here = Fingerprint("gfx1010", "10.3.0", torch, "hip 6.2", machine.driver, kernel or machine.kernel)
    store = Store(tmp_path / "learned")
    for number, (strategy, kind) in enumerate(failures):
        store.put(here, f"spec {number}", f"forward number {number}", strategy, Verdict(kind, evidence="seen"))
    store.close()
    staged.environ["ROCM_PATCH_CACHE_DIR"] = str(tmp_path / "learned")
    return [finding for finding in staged.findings() if finding["check"] == "recorded_failures"]


def test_recorded_failures_are_counted(tmp_path):
    (finding,) = recorded(tmp_path, ("native", "hang"), ("native", "crash"), ("native", "hang"), ("native", "ok"))
    assert finding["level"] == "ok" and finding["fix"] == "rocm-patch cache show"
    assert finding["summary"].startswith("3 recorded failures of convolutions (1 crash, 2 hang)")


def test_a_build_whose_matrix_products_fail_cannot_run_here(tmp_path):
    """Nothing is left to fall back to: doctor says so, and what would run."""
    native, ours = recorded(tmp_path, ("native", "crash"), ("im2col", "wrong"))
    assert native["level"] == "ok" and ours["level"] == "failure"
    assert "torch 2.6.0+rocm6.2.4 cannot run here" in ours["summary"] and "im2col of forward number 1" in ours["why"]
    assert "torch[device-gfx1010]" in ours["fix"]


def test_failures_under_another_kernel_or_torch_are_not_todays(tmp_path):
    assert recorded(tmp_path, ("native", "crash"), kernel="6.1.0") == []
