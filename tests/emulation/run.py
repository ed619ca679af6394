"""Runs the kernels on processors that this machine is not, under an emulator: Arm with each instruction set, x86 without AVX2.

    python tests/emulation/run.py FOLDER [neon dotprod i8mm portable nehalem sandybridge] [--intrinsics]

For Debian on x86-64, with the packages qemu-user-static and mmdebstrap. FOLDER keeps what takes long to make: an Arm root from Debian's
packages, the Python packages for it, compiled kernels (on x86, by cross_compile.py: under the emulator it would take ten times as long).
Then the built-in model runs, and its hashes must be the known ones (refimpl/files/reproducibility.py). `--intrinsics` runs
tests/test_simd.py as well, compiled under the emulator. What an emulator cannot show: speed, and the memory order of Arm, which is weaker.

Takes about 3 minutes a target the first time, 1 minute later. Exit status: 0 all the known bits, 1 others, 3 something could not be run.
"""

import argparse
import base64
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from cross_compile import TARGETS, Target

from refimpl.files.reproducibility import KNOWN, runs

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
RUNS = [("q8", 2, 16), ("exact", 2, 16), ("q8", 1, 1), ("exact", 1, 5)]          # arithmetic, threads, rows a call
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class CannotRun(Exception):
    """Something is missing; the message says what."""


def program(name: str) -> str:
    """Where a program is. Raises CannotRun."""
    found = shutil.which(name)
    if not found:
        raise CannotRun(f"{name} is not installed")
    return found


def done(command: list[str], **options) -> str:
    """What a command prints. Raises CannotRun with the end of its messages where it fails."""
    process = subprocess.run(command, capture_output=True, text=True, **options)
    if process.returncode:
        said = (process.stderr or process.stdout).strip().splitlines()
        raise CannotRun(f"{Path(command[0]).name} ended with status {process.returncode}: {' / '.join(said[-3:])}")
    return process.stdout


# ---- an Arm system

def arm_root(folder: Path) -> Path:
    """A folder with Debian's Python and C libraries for Arm. Unpacked, never booted: no Arm program runs to make it."""
    root = folder / "root"
    if not root.exists():
        index = done(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"])
        release = debian_release()
        site = next((line.split()[0] for line in index.splitlines() if line.split()[1:] == [release, "main"]), None)
        if site is None:
            raise CannotRun(f"apt knows no archive of Debian {release}")
        part = root.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        done([program("mmdebstrap"), "--variant=extract", "--architectures=arm64", "--include=python3,libgomp1,libstdc++6,zlib1g", release,
              str(part), f"deb [signed-by={KEYRING}] {site} {release} main"])
        part.rename(root)
    if not (root / f"usr/bin/python{VERSION}").exists():
        raise CannotRun(f"the Arm root has another Python than {VERSION}, which runs this: compiled kernels are kept for one version")
    return root


def debian_release() -> str:
    """Debian's code name of the system."""
    found = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    if not found:
        raise CannotRun("/etc/os-release names no Debian release")
    return found[1]


def arm_packages(folder: Path) -> Path:
    """A folder with the Python packages that refimpl needs, for Arm, with the versions that are installed here."""
    site = folder / "site"
    if not site.exists():
        names = [re.match(r"[\w-]+", line)[0] for line in importlib.metadata.requires("refimpl") if "extra ==" not in line]
        names += ["pytest", "filelock"]
        wheels, part = folder / "wheels", site.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)] + ["--platform=manylinux2014_aarch64"]
        done([sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), *platforms, "--only-binary=:all:",
              f"--python-version={VERSION}", "--implementation=cp", f"--abi=cp{VERSION.replace('.', '')}", "--abi=abi3", "--abi=none",
              *(f"{name}=={importlib.metadata.version(name)}" for name in names)])
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(part)
        part.rename(site)
    return site


def emulator(target: Target, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command that starts Python on the target, and its environment."""
    qemu = [program(f"qemu-{target.architecture}-static"), "-cpu", target.emulated]
    paths, environment = [str(CHECKOUT), str(HERE.parent)], os.environ | target.environment()
    if target.architecture == "aarch64":
        root, site = arm_root(folder), arm_packages(folder)
        return ([*qemu, "-L", str(root), str(root / f"usr/bin/python{VERSION}")],
                environment | {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": os.pathsep.join([str(site), *paths])})
    return [*qemu, sys.executable], environment | {"PYTHONPATH": os.pathsep.join(paths)}


# ---- kernels, and what they compute

def signatures() -> str:
    """The argument types of all kernels that RUNS call, for cross_compile.py. Runs the model natively."""
    from refimpl.kernels.machine.jit import KERNELS

    list(runs(None, RUNS))
    return base64.b64encode(pickle.dumps({name: kernel.signatures for name, kernel in KERNELS.items() if kernel.signatures})).decode()


def compile_kernels(name: str, cache: Path, wanted: str) -> str:
    """Fills the cache of a target on this machine, and returns what to say of it."""
    environment = os.environ | {"REFIMPL_CACHE_DIR": str(cache), "PYTHONPATH": str(CHECKOUT)}
    return done([sys.executable, str(HERE / "cross_compile.py"), name], input=wanted, env=environment).strip()


def check(name: str, folder: Path, wanted: str, intrinsics: bool) -> bool:
    """Runs a target and says what came of it. Raises CannotRun."""
    target, cache = TARGETS[name], folder / f"cache-{name}"
    command, environment = emulator(target, folder)
    environment |= {"REFIMPL_CACHE_DIR": str(cache), "NUMBA_NUM_THREADS": "2"}
    print(f"{name}: {compile_kernels(name, cache, wanted)}", flush=True)
    begin = time.monotonic()
    lines = done([*command, "-m", "refimpl.files.reproducibility", json.dumps([None, RUNS])], env=environment, cwd=folder).splitlines()
    messages = [json.loads(line) for line in lines]
    for message in messages:
        if "error" in message:
            raise CannotRun(message["error"])
    found = [message["run"] for message in messages if "run" in message]
    right = [run["isa"] == target.isa and run["sha256"] == KNOWN[run["arithmetic"]] for run in found]
    late = sum("compiling" in message for message in messages)
    print(f"{name}: {target.isa} on an emulated {target.emulated}: {sum(right)} of {len(RUNS)} runs have the known bits "
          f"({time.monotonic() - begin:.0f} s{f', {late} kernels compiled there' if late else ''})", flush=True)
    same = sum(right) == len(RUNS)
    if intrinsics:
        process = subprocess.run([*command, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-o", "addopts=",
                                  str(HERE.parent / "test_simd.py")], env=environment, cwd=folder, capture_output=True, text=True)
        print(f"{name}: test_simd.py: {(process.stdout or process.stderr).strip().splitlines()[-1]}", flush=True)
        same &= process.returncode == 0
    return same


def main():
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--intrinsics", action="store_true", help="also test_simd.py, two minutes more a target")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(TARGETS)}")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted, status = signatures(), 0
    for name in arguments.targets:
        try:
            if not check(name, folder, wanted, arguments.intrinsics):
                status = 1
        except CannotRun as e:
            print(f"{name}: not run: {e}", flush=True)
            status = status or 3
    sys.exit(status)


if __name__ == "__main__":
    main()
