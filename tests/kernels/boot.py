"""
Run this checkout's tests in other kernels: boots a virtual machine for each, needs neither KVM nor root in it.

    python -m tests.kernels.boot [--cache DIR] [--kernel PACKAGE]... [PYTEST_ARGUMENT]...

The machine's disk is an ext4 image of the interpreter that runs this, its packages, a compiler and this checkout,
made with `mke2fs -d`. Debian's cloud kernels have ext4 and NVMe built in, so they find it without an initramfs. The
kernels come from the Debian mirror that apt is set up for. Emulated (TCG), a boot takes about five seconds.
What fails is tried a second time, in the same machine; a machine that does not come to its end is started once more.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "kernel"
# A pattern for each kernel: the newest package that matches is taken.
KERNELS = {"6.1": r"linux-image-6\.1\.0-\d+-cloud-amd64", "6.12": r"linux-image-6\.12\.\d+\+deb\d+-cloud-amd64"}
# What the tests run, by Debian package.
# fmt: off
PACKAGES = [
    "bash", "binutils", "binutils-common", "binutils-x86-64-linux-gnu", "busybox-static", "coreutils", "cpp-12", "dash",
    "gcc", "gcc-12", "grep", "libbinutils", "libc-bin", "libc6", "libc6-dev", "libcap2-bin", "libctf-nobfd0", "libctf0",
    "libgcc-12-dev", "libgcc-s1", "libgmp10", "libgprofng0", "libisl23", "libjansson4", "libmpc3", "libmpfr6",
    "libzstd1", "linux-libc-dev", "mount", "procps", "sed", "util-linux", "zlib1g",
]
# fmt: on
# Of the interpreter's packages, what no test imports.
NOT_NEEDED = {"mypy", "mypyc", "pip", "setuptools", "pkg_resources", "hatchling", "build", "coverage", "librt"}
# What of the kernel's modules the tests need; all else that they need is built in.
MODULES = ["overlay"]
# Tests that say nothing about a source on another kernel, or ask more than an emulated machine can give.
LEFT_OUT = {
    "test_container_events.py": "of the registry of containers, which reads files that are the same on every kernel",
    "test_containers.py": "of the registry of containers, and takes minutes",
    "test_faults.py": "of the agent among failing descriptors and other agents, which no kernel changes",
    "test_hostile.py": "of decoders that are the same on every kernel, with thousands of processes",
    "test_loss.py": "fills buffers with tens of thousands of processes, each of which takes 10 ms here",
    "test_storms.py": "thousands of processes, each of which takes 10 ms here",
    "test_unprivileged.py": "of the command and its ladder; needs strace, which is slow here",
}
MEMORY_MB = 2048
# While a machine works, its time is the count of its instructions, 8 ns each: no test comes late because the host is
# busy. While it waits, its time is the host's (sleep=off would jump over it, over minutes in wait of a disk).
# With such a clock 6.1 never starts a second processor: so there is one, and the machines run side by side.
CLOCK = ["-icount", "shift=3,sleep=on"]
SECONDS = 1200  # of the host's time, for a machine; an idle host takes a sixth of that
TEST_SECONDS = 120  # of the machine's time, for a test
# Without what costs an emulated machine most of its time: flushes at each system call, a fifth level of page tables,
# clearing memory that is overwritten, a clock outside of the processor.
FASTER = "mitigations=off no5lvl init_on_alloc=0 tsc=reliable clocksource=tsc"
PARAMETERS = f"console=ttyS0 root=/dev/nvme0n1 rw init=/init quiet panic=-1 {FASTER}"
AGAIN = "== once more, what failed"
# The plugins that are left out take ten seconds to load.
OPTIONS = (
    f"-p no:hypothesispytest -p no:cov -p no:randomly -o cache_dir=/tmp/pytest -q --color=no --timeout={TEST_SECONDS}"
)
INIT = """#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root CI=true PYTHONUNBUFFERED=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
busybox ip link set lo up
echo 500 > /proc/sys/fs/fanotify/max_queued_events  # soon full
for module in /lib/modules/$(uname -r)/*; do busybox insmod $module; done
cd {root}
echo "== $(uname -r), clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
export PYTHONPATH={root}:{site} PYTEST_ADDOPTS="{options}"
{python} -m pytest {arguments}
code=$?
if [ $code = 1 ]; then
    echo "{again}"
    {python} -m pytest --last-failed --last-failed-no-failures none {arguments}
    code=$?
fi
echo "== exit code $code"
busybox poweroff -f
"""


class Unavailable(Exception):
    """
    A kernel that cannot be had here, and why.
    """


class Outcome(NamedTuple):
    """
    What a machine said of its tests.
    """

    finished: bool = False
    code: int = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    again: bool = False
    second: int = 0
    """
    Of those that passed, at the second try only.
    """
    seconds: float = 0
    """
    That it took, of the host's time.
    """

    @property
    def good(self) -> bool:
        return self.finished and self.code == 0 and self.passed > 0

    def __str__(self) -> str:
        second = f" ({self.second} at the second try)" if self.second else ""
        ended = "" if self.finished else ", and it did not come to its end"
        return (
            f"{self.passed} passed{second}, {self.failed} failed, {self.skipped} skipped{ended} ({self.seconds:.0f} s)"
        )


def newest(pattern: str) -> str:
    """
    Name of the package that apt would give, the highest version of those that match.

    Raises:
        Unavailable: apt knows of none.
    """
    command = ["apt-cache", "pkgnames", "linux-image-6"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [name for name in found.split() if re.fullmatch(pattern, name)]
    if not names:
        raise Unavailable(f"apt knows no package {pattern}: set up Debian's sources")
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def unpack(package: str, cache: Path) -> Path:
    """
    Where the kernel of a package is, downloaded once.

    Raises:
        Unavailable: It cannot be downloaded.
    """
    unpacked = cache / package
    if not unpacked.exists():
        downloads = cache / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "-o", "APT::Sandbox::User=root", "-qq", "download", package]
        done = subprocess.run(command, cwd=downloads, capture_output=True, text=True, check=False)
        archive = next(downloads.glob(f"{package}_*.deb"), None)
        if done.returncode or archive is None:
            why = done.stderr.partition("\n")[0] or "no file"
            raise Unavailable(f"apt-get download {package}: {why}")
        subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        archive.unlink()
    return unpacked


def fetch(kernel: str, cache: Path) -> Path:
    """
    Where a kernel of KERNELS is, or that of a package; apt's lists are renewed where they do not lead to it.

    Raises:
        Unavailable: It cannot be had.
    """
    for renewed in (False, True):
        try:
            return unpack(newest(KERNELS[kernel]) if kernel in KERNELS else kernel, cache)
        except Unavailable:
            if renewed:
                raise
            subprocess.run(["apt-get", "-qq", "update"], capture_output=True, check=False)
    raise AssertionError


def shared_objects(binaries: Iterable[str | Path]) -> Iterator[Path]:
    """
    Libraries that the binaries need, as ldd(1) finds them.
    """
    found = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    yield from {Path(name) for name in re.findall(r"(/\S+) \(0x", found)}


def files() -> Iterator[Path]:
    """
    Everything that the machine's disk is to hold, at the paths that it has here.
    """
    listing = subprocess.run(["dpkg", "-L", *PACKAGES], capture_output=True, text=True, check=False).stdout
    names = [name for name in listing.splitlines() if not name.startswith(("/usr/share/doc", "/usr/share/man"))]
    yield from map(Path, names)
    yield from shared_objects(name for name in names if "/bin/" in name or "/sbin/" in name)
    interpreter, library = Path(os.path.realpath(sys.executable)), Path(sysconfig.get_path("stdlib"))
    yield interpreter
    extensions = list(library.glob("lib-dynload/*.so"))
    yield from shared_objects([interpreter, *extensions])
    skipped = ("test", "tests", "site-packages", "dist-packages", "idlelib", "tkinter", "ensurepip")
    for directory, names, entries in os.walk(library):
        names[:] = [name for name in names if name not in skipped and not name.startswith("config-")]
        yield from (Path(directory, entry) for entry in entries)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if package.name not in NOT_NEEDED:
            yield from package.rglob("*") if package.is_dir() else [package]
    for directory, names, entries in os.walk(ROOT):
        names[:] = [name for name in names if not name.startswith(".") and name not in ("build", "dist", "__pycache__")]
        yield from (Path(directory, entry) for entry in entries)


def copy(source: Path, tree: Path) -> None:
    """
    Put a file, a link or a directory to its place below `tree`, with what the way to it needs.
    """
    parent = source.parent.resolve()  # /lib is a link to /usr/lib: one place for both names
    target = tree / str(parent).lstrip("/") / source.name
    if source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink() and not target.exists():
            target.symlink_to(os.readlink(source))
        copy(Path(os.path.normpath(parent / os.readlink(source))), tree)
    elif source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def copy_modules(unpacked: Path, tree: Path) -> None:
    """
    Put the modules of one kernel to where /init looks for them.
    """
    (modules,) = unpacked.glob("lib/modules/*")
    target = tree / "lib/modules" / modules.name
    target.mkdir(parents=True)
    for name in MODULES:
        (module,) = modules.rglob(f"{name}.ko*")
        data = module.read_bytes()
        (target / f"{name}.ko").write_bytes(lzma.decompress(data) if module.suffix == ".xz" else data)


def disk(cache: Path, kernels: Iterable[Path], arguments: list[str]) -> Path:
    """
    An image of the machine's disk.
    """
    tree, image = cache / "tree", cache / "disk.ext4"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (tree / name).symlink_to(os.readlink(f"/{name}"))
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "mnt", "var/tmp", "usr/sbin"):
        (tree / name).mkdir(parents=True)
    for source in files():
        copy(source, tree)
    for name in ("etc/passwd", "etc/group"):
        copy(Path("/", name), tree)
    for kernel in kernels:
        copy_modules(kernel, tree)
    # Compiling takes an emulated machine longer than running what was compiled.
    sources = map(str, tree.glob(f"{str(ROOT)[1:]}/*/"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-s", str(tree), "-p", "/", *sources], check=True)
    init = tree / "init"
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    python = Path(os.path.realpath(sys.executable))
    site = sysconfig.get_path("purelib")
    init.write_text(INIT.format(root=ROOT, site=site, python=python, options=OPTIONS, again=AGAIN, arguments=quoted))
    init.chmod(0o755)
    size = sum(path.lstat().st_size + 4096 for path in tree.rglob("*")) * 5 // 4 >> 20
    image.unlink(missing_ok=True)
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), f"{size + 256}M"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    shutil.rmtree(tree)
    return image


def boot(kernel: Path, image: Path) -> Outcome:
    """
    Start the machine, show what it says, and tell what became of its tests.
    """
    (vmlinuz,) = kernel.glob("boot/vmlinuz-*")
    command = ["qemu-system-x86_64", "-accel", "tcg", *CLOCK, "-cpu", "max", "-m", str(MEMORY_MB)]
    command += ["-smp", "1", "-nographic", "-no-reboot", "-net", "none", "-snapshot"]
    command += ["-drive", f"file={image},if=none,id=disk,format=raw", "-device", "nvme,serial=disk,drive=disk"]
    command += ["-kernel", str(vmlinuz), "-append", PARAMETERS]
    outcome = Outcome()
    with subprocess.Popen(
        ["timeout", "-s", "KILL", str(SECONDS), *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as machine:
        assert machine.stdout is not None
        for line in machine.stdout:
            text = re.sub(r"\x1b\S*|[^\x20-\uffff]", "", line.decode("utf-8", "replace").rstrip())
            print(f"{kernel.name}: {text}\n", end="", flush=True)  # at once: others print, too
            outcome = hear(text, outcome)
    return outcome


def hear(text: str, before: Outcome) -> Outcome:
    """
    What a line of the machine adds to what is known: pytest's last one has the counts, that of /init the exit code.
    """
    if code := re.search(r"== exit code (\d+)", text):
        return before._replace(finished=True, code=int(code[1]))
    if AGAIN in text:
        return before._replace(again=True)
    if not re.search(r"\d+ \w+ in [\d.]+s", text):
        return before
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text)}
    passed, failed = counts.get("passed", 0), sum(counts.get(kind, 0) for kind in ("failed", "error", "errors"))
    if before.again:
        return before._replace(passed=before.passed + passed, failed=failed, second=passed)
    return before._replace(passed=passed, failed=failed, skipped=counts.get("skipped", 0))


def tried(kernel: Path, image: Path) -> Outcome:
    """
    What became of the tests in a kernel, in one machine or, where that does not come to its end, in a second.
    """
    begin = time.monotonic()
    outcome = boot(kernel, image)
    if not outcome.finished:
        print(f"== {kernel.name}: no end within {SECONDS} s, or before its tests had one: once more", flush=True)
        outcome = boot(kernel, image)
    return outcome._replace(seconds=time.monotonic() - begin)


def cases() -> list[str]:
    """
    The tests that are run where none are named.
    """
    return [str(path.relative_to(ROOT)) for path in sorted(TESTS.glob("test_*.py")) if path.name not in LEFT_OUT]


def main() -> int:
    """
    Boot them all.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "kernels", help="where kernels and the disk are kept"
    )
    parser.add_argument("--kernel", action="append", help=f"a package, or one of {', '.join(KERNELS)}; default: all")
    known, arguments = parser.parse_known_args()
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if missing := [tool for tool in ("qemu-system-x86_64", "mke2fs", "dpkg", "apt-get") if not shutil.which(tool)]:
        print(f"no other kernel was tried: needs {' and '.join(missing)}")
        return 0
    cache = known.cache.resolve()
    kernels, lines, good = [], [], True
    for name in known.kernel or KERNELS:
        try:
            kernels.append(fetch(name, cache))
        except Unavailable as error:
            lines.append(f"{name}: not tried, for it cannot be had: {error}")
    if not any((ROOT / argument.partition("::")[0]).exists() for argument in arguments):  # options only
        arguments += cases()
    if kernels:
        image = disk(cache, kernels, arguments)
        with ThreadPoolExecutor() as side_by_side:
            for kernel, outcome in zip(kernels, side_by_side.map(partial(tried, image=image), kernels), strict=True):
                good &= outcome.good
                lines.append(f"{kernel.name}: {outcome}")
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
