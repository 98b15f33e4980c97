"""Lay out what a Python environment needs of the system around it: the root of an image in which nothing else is.

    python system.py ENVIRONMENT ROOT

Taken are the interpreter with its standard library, every shared library that these and the environment ask the loader
for, the certificates of authorities, and each package's licence and entry in Debian's database, by which a scanner
knows what lies here. No shell, no package manager. Runs in the build, by the standard library alone; knows nothing of
Convoy.
"""

import compileall
import os
import py_compile
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Of the standard library: what needs a display, tests, tools of development, and a second way to install things.
LEFT_OUT = (
    "__pycache__", "config-*", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "sitecustomize.py", "test", "tests", "tkinter", "turtle.py", "turtledemo", "_test*.so", "_ctypes_test*.so",
    "_tkinter*.so", "_xx*.so",
)  # fmt: skip
# The loader's list does not have them: glibc opens the first by name when a thread ends early, the others are for the
# host's NVIDIA driver, which is mounted and finds nothing here but what is here.
BY_NAME = ("libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1")
FILES = ("/etc/debian_version", "/etc/os-release", "/etc/ld.so.conf", "/etc/ssl/certs/ca-certificates.crt")
# Where a container's runtime and NVIDIA's hook mount what the kernel gives; not every one makes them itself.
MOUNTED = ("dev", "proc", "sys")
USERS = {
    "passwd": "root:x:0:0:root:/tmp:/nonexistent\nconvoy:x:10001:10001:convoy:/tmp:/nonexistent\n",
    "group": "root:x:0:\nconvoy:x:10001:\n",
}


class Root:
    """A directory that becomes an image's `/`; files are put in at the paths that they have here, links with them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.taken: set[Path] = set()
        directory.mkdir(parents=True)
        # /lib and its like are links into /usr since Debian 12, and the kernel looks for the loader in /lib64.
        for name in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):
            link = Path("/", name)
            if link.is_symlink():
                (directory / name).symlink_to(link.readlink())
                (directory / "usr" / name).mkdir(parents=True, exist_ok=True)

    def inside(self, path: Path) -> Path:
        """Return where a path of the image lies now."""
        return self.directory / path.relative_to("/")

    def take(self, path: Path) -> None:
        """Put in a file; of a link, each step up to the file it means."""
        path = Path(os.path.realpath(path.parent), path.name)
        target = self.inside(path)
        if path in self.taken or not os.path.lexists(path):
            return
        self.taken.add(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
            self.take(path.parent / path.readlink())
        elif path.is_file():
            shutil.copy2(path, target)

    def take_tree(self, path: Path) -> None:
        """Put in a directory, less what nobody needs who only runs programs."""
        kept = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(path, self.inside(path), ignore=kept, dirs_exist_ok=True)
        self.taken.update(path / file.relative_to(self.inside(path)) for file in self.inside(path).rglob("*"))

    def write(self, path: str, text: str) -> None:
        """Put in a file that is not here."""
        target = self.inside(Path(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def _programs(*directories: Path) -> Iterator[Path]:
    """Yield the shared libraries and extension modules below the directories, by what they begin with."""
    for directory in directories:
        for path in sorted(directory.rglob("*.so*")):
            if path.is_file() and path.open("rb").read(4) == b"\x7fELF":
                yield path


def _libraries(programs: list[Path], environment: Path) -> set[Path]:
    """Return what the loader finds for the programs outside of the environment; what it does not find is told."""
    found: set[Path] = set()
    # A list as long as all of CUDA is within what a command line may hold; ldd is a script that asks one by one.
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    for line in listed.stdout.splitlines():
        if match := re.fullmatch(r"\s+(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)", line):
            path = Path(match[1])
            if environment not in path.parents:
                found.add(path)
    missing = set(re.findall(r"(\S+) => not found", listed.stdout))
    print("not here, so left to the host or to a preload:", ", ".join(sorted(missing)) or "nothing")
    beside = {path.parent for path in found}
    return found | {path / name for path in beside for name in BY_NAME if (path / name).exists()}


def _packages(paths: set[Path]) -> set[str]:
    """Return the Debian packages that the files are from; those that no package has are Python's own, built apart."""
    # Debian's database has the paths of before /lib became a link, too.
    asked = {str(path) for path in paths} | {str(path).removeprefix("/usr") for path in paths}
    names: set[str] = set()
    for start in range(0, len(asked), 500):
        command = ["dpkg-query", "--search", *sorted(asked)[start : start + 500]]
        told = subprocess.run(command, capture_output=True, text=True).stdout
        names |= {name.strip() for line in told.splitlines() for name in line.rpartition(": ")[0].split(",")}
    return {name for name in names if name and not name.startswith("diversion")}


def lay_out(environment: Path, root: Root) -> None:
    """Fill the root.

    Raises:
        CalledProcessError: one of Debian's tools failed.
    """
    interpreter = environment / "bin" / "python"
    while environment in interpreter.parents:
        interpreter = interpreter.parent / interpreter.readlink()
    standard = Path(sysconfig.get_path("stdlib"))
    root.take(interpreter)
    root.take_tree(standard)

    programs = [Path(os.path.realpath(interpreter)), *_programs(root.inside(standard), environment)]
    for library in _libraries(programs, environment):
        root.take(library)
    for file in FILES:
        root.take(Path(file))
    for file in Path("/etc/ld.so.conf.d").glob("*.conf"):
        root.take(file)
    # OpenSSL looks for authorities in its own directory, whose entries are links to those above.
    openssl = ssl.get_default_verify_paths()
    for place in (openssl.openssl_cafile, openssl.openssl_capath):
        root.take(Path(place))
    for name, text in USERS.items():
        root.write(f"/etc/{name}", text)

    for package in sorted(_packages(root.taken)):
        entry = subprocess.run(["dpkg-query", "--status", package], capture_output=True, text=True, check=True).stdout
        name = package.partition(":")[0]
        root.write(f"/var/lib/dpkg/status.d/{name}", entry)
        root.take(Path("/usr/share/doc", name, "copyright"))

    # Compiled here, since a root that is read-only keeps nothing; by content, since copies may lose times.
    here = root.inside(standard)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(here, quiet=1, invalidation_mode=mode, stripdir=root.directory, prependdir="/")
    subprocess.run(["/sbin/ldconfig", "-r", root.directory], check=True)
    (root.directory / "tmp").mkdir()
    (root.directory / "tmp").chmod(0o1777)
    for name in MOUNTED:
        (root.directory / name).mkdir()


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), Root(Path(sys.argv[2])))
