"""
Run this checkout's tests in other kernels: boots a virtual machine for each, needs neither KVM nor root in it.

    python -m tests.kernels.boot [--cache DIR] [--kernel PACKAGE]... [PYTEST_ARGUMENT]...

The machine's disk is an ext4 image of the interpreter that runs this, its packages, a compiler and this checkout,
made with `mke2fs -d`. Debian's cloud kernels have ext4 and NVMe built in, so they find it without an initramfs. The
kernels come from the Debian mirror that apt is set up for. Emulated (TCG), a boot takes about five seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A pattern for each kernel: the newest package that matches is taken.
KERNELS = {"6.1": r"linux-image-6\.1\.0-\d+-cloud-amd64", "6.12": r"linux-image-6\.12\.\d+\+deb12-cloud-amd64"}
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
MEMORY_MB, CPUS, SECONDS = 2048, 2, 600
INIT = """#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root CI=true PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
busybox ip link set lo up
cd {root}
echo "== $(uname -r)"
PYTHONPATH={root}:{site} {python} -m pytest -p no:cacheprovider -p no:randomly -q --color=no {arguments}
echo "== exit code $?"
busybox poweroff -f
"""


def newest(pattern: str) -> str:
    """
    Name of the package that apt would give, the highest version of those that match.
    """
    command = ["apt-cache", "pkgnames", "linux-image-6"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [name for name in found.split() if re.fullmatch(pattern, name)]
    if not names:
        sys.exit(f"no package matches {pattern}: apt-get update?")
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def kernel_image(package: str, cache: Path) -> Path:
    """
    The kernel in a package, downloaded once.
    """
    unpacked = cache / package
    if not unpacked.exists():
        downloads = cache / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "-o", "APT::Sandbox::User=root", "-qq", "download", package]
        subprocess.run(command, cwd=downloads, check=True)
        (archive,) = downloads.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        archive.unlink()
    (image,) = unpacked.glob("boot/vmlinuz-*")
    return image


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
    skipped = ("test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "tkinter", "ensurepip")
    for directory, names, entries in os.walk(library):
        names[:] = [name for name in names if name not in skipped and not name.startswith("config-")]
        yield from (Path(directory, entry) for entry in entries)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if package.name not in NOT_NEEDED:
            yield from package.rglob("*") if package.is_dir() else [package]
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    ours = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    yield from (ROOT / os.fsdecode(name) for name in ours.splitlines())


def copy(source: Path, tree: Path) -> None:
    """
    Put a file, a link or a directory to its place below `tree`, with what the way to it needs.
    """
    if source.name == "__pycache__" or source.suffix == ".pyc":
        return
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


def disk(cache: Path, arguments: list[str]) -> Path:
    """
    An image of the machine's disk.
    """
    tree, image = cache / "tree", cache / "disk.ext4"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (tree / name).symlink_to(os.readlink(f"/{name}"))
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "var/tmp", "usr/sbin"):
        (tree / name).mkdir(parents=True)
    for source in files():
        copy(source, tree)
    for name in ("etc/passwd", "etc/group"):
        copy(Path("/", name), tree)
    init = tree / "init"
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    python = Path(os.path.realpath(sys.executable))
    init.write_text(INIT.format(root=ROOT, site=sysconfig.get_path("purelib"), python=python, arguments=quoted))
    init.chmod(0o755)
    size = sum(path.lstat().st_size + 4096 for path in tree.rglob("*")) * 5 // 4 >> 20
    image.unlink(missing_ok=True)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image, f"{size + 64}M"], check=True)
    shutil.rmtree(tree)
    return image


def boot(kernel: Path, image: Path) -> bool:
    """
    Start the machine, show what it says, and tell whether its tests passed.
    """
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(MEMORY_MB)]
    command += ["-smp", str(CPUS), "-nographic", "-no-reboot", "-net", "none", "-snapshot"]
    command += ["-drive", f"file={image},if=none,id=disk,format=raw", "-device", "nvme,serial=disk,drive=disk"]
    command += ["-kernel", str(kernel)]
    command += ["-append", "console=ttyS0 root=/dev/nvme0n1 rw init=/init quiet panic=-1"]
    passed = False
    with subprocess.Popen(
        ["timeout", "-s", "KILL", str(SECONDS), *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as machine:
        assert machine.stdout is not None
        for line in machine.stdout:
            text = line.decode("utf-8", "replace").rstrip()
            print(re.sub(r"\x1b\S*|[^\x20-\uffff]", "", text), flush=True)
            passed |= "== exit code 0" in text
    return passed


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
    for tool in ("qemu-system-x86_64", "mke2fs", "dpkg", "apt-get"):
        if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            sys.exit(f"needs {tool}")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    packages = [newest(KERNELS[name]) if name in KERNELS else name for name in known.kernel or KERNELS]
    kernels = [kernel_image(package, known.cache) for package in packages]
    image = disk(known.cache, arguments or ["tests/kernel"])
    failed = [kernel.name for kernel in kernels if not boot(kernel, image)]
    print(f"failed: {', '.join(failed)}" if failed else f"passed on {', '.join(kernel.name for kernel in kernels)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
