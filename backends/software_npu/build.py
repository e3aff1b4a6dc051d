"""Builds the software NPU: stand-ins for the CANN libraries that torch_npu links to, and the operators on its tensors.

With g++ and the headers of the installed wheels, when first asked for, into a folder of the cache that is named after
the wheels and the sources. Imports neither torch nor torch_npu: without CANN, torch_npu fails until this is there.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

from octofold.backends.errors import UserError

SOURCES = Path(__file__).parent
OPERATORS = "operators.so"
ACL, HCCL = "libascendcl.so", "libhccl.so"
GROUP_CALLS = "libhcomm.so"
"""Where torch_npu looks for HcclGroupStart and its kin, without linking to it."""
FLAGS = ["-std=c++20", "-O1", "-fPIC"]
TOOLS = ("g++", "nm", "readelf")


def build() -> Path:
    """The folder with the libraries, built where it is not there yet. Safe to call from several processes.

    Raises:
        UserError: a wheel or a tool is missing, or the compiler fails.
    """
    folder = _cache() / _key()
    if not folder.exists():
        # Here, since the doctor looks at this file where nothing is installed.
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build_into(folder)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("OCTOFOLD_CACHE") or "~/.cache/octofold").expanduser().absolute() / "software_npu"


def _key() -> str:
    """Names what goes into a build."""
    try:
        versions = f"{version('torch')}-{version('torch-npu')}"
    except PackageNotFoundError as missing:
        rule = "the software NPU runs the wheels of torch and torch_npu"
        raise UserError(f"{missing.name}\n  rule:   {rule}\n  remedy: make test-ascend (docs/ascend.md)") from None
    told = hashlib.sha256()
    for path in sorted([Path(__file__), *SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.h")]):
        told.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{versions}-{told.hexdigest()[:16]}"


def _build_into(folder: Path) -> None:
    for tool in TOOLS:
        if shutil.which(tool) is None:
            rule = "the software NPU is built when first asked for, with g++ and binutils"
            raise UserError(f"{tool}\n  rule:   {rule}\n  remedy: apt-get install g++")
    work = Path(mkdtemp(prefix="building-", dir=folder.parent))
    try:
        _link(work)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link(out: Path) -> None:
    """Every library, into `out`."""
    torch, torch_npu = _wheel("torch"), _wheel("torch_npu")
    parts = ["acl", "hccl", "operators"]
    headers = [torch_npu / "include", *(torch_npu / f"include/third_party/{name}/inc" for name in ("acl", "hccl"))]
    headers += [torch / "include", torch / "include/torch/csrc/api/include"]
    sources = [path for part in parts for path in sorted((SOURCES / part).glob("*.cpp"))]
    # The largest last would leave a core idle.
    sources.sort(key=lambda path: path.parent.name != "operators")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _compile(source, headers, out), sources))
    acl, hccl, operators = ([o for o in objects if o.name.startswith(f"{part}_")] for part in parts)
    libs = torch / "lib"
    _shared(out / ACL, acl, ["-lpthread", "-ldl"])
    _shared(out / HCCL, hccl, [f"-L{out}", "-lascendcl", "-lpthread"])
    _shared(out / GROUP_CALLS, [], ["-Wl,--no-as-needed", f"-L{out}", "-lhccl", "-lascendcl"])
    _fill(out, torch, torch_npu)
    # torch_npu is loaded by then; what it links to in turn is in `out`.
    folders = [f"-L{folder}" for folder in (libs, torch_npu / "lib", out)]
    linked = ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_npu", "-lascendcl", "-Wl,--allow-shlib-undefined"]
    _shared(out / OPERATORS, operators, [*folders, *linked, f"-Wl,-rpath,{libs}"])
    for path in objects:
        path.unlink()


def _fill(out: Path, torch: Path, torch_npu: Path) -> None:
    """The other libraries that torch_npu links to; one holds every function that is still missing, which returns 0."""
    mine = [*torch_npu.glob("_C*.so"), *(torch_npu / "lib").glob("*.so")]
    carried = [*mine, *(torch / "lib").glob("*.so*")]
    missing = _symbols(mine, "--undefined-only") - _symbols([*carried, out / ACL, out / HCCL], "--defined-only")
    needed = {name for path in mine for name in _run(["readelf", "-d", str(path)], r"NEEDED.*\[(.*?)\]")}
    # A system's library has its version in its name.
    cann = sorted(name for name in needed - {path.name for path in carried} if name.endswith(".so"))
    remaining = [name for name in cann if not (out / name).exists()]
    for library, names in zip(remaining, [sorted(missing), *([[]] * len(remaining))], strict=False):
        source = out / f"{library}.c"
        texts = [f'long f{i}(void) __asm__("{name}"); long f{i}(void) {{ return 0; }}' for i, name in enumerate(names)]
        source.write_text("\n".join(texts) or "typedef int empty;", encoding="utf-8")
        _shared(out / library, [source], ["-xnone", "-Wl,--no-as-needed", f"-L{out}", "-lascendcl"], ["-xc"])
        source.unlink()


def _symbols(paths: Iterable[Path], which: str) -> set[str]:
    """Dynamic symbols without a version (the system's have one), neither weak nor Python's."""
    lines = (line.split() for path in paths for line in _run(["nm", "-D", which, str(path)], r"(.+)\n"))
    named = {fields[-1] for fields in lines if fields[-2] not in ("w", "v")}
    return {name for name in named if "@" not in name and not re.match("_?Py", name)}


def _compile(source: Path, headers: list[Path], out: Path) -> Path:
    made = out / f"{source.parent.name}_{source.stem}.o"
    _run(["g++", *FLAGS, *(f"-isystem{path}" for path in headers), "-c", str(source), "-o", str(made)])
    return made


def _shared(library: Path, inputs: list[Path], further: list[str], before: list[str] | None = None) -> None:
    name = f"-Wl,-soname,{library.name}"
    _run(["g++", "-shared", "-fPIC", name, "-o", str(library), *(before or []), *map(str, inputs), *further])


def _run(command: list[str], pattern: str = "") -> list[str]:
    """Run a tool; what `pattern` finds in its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shown, rule = " ".join(command), "the software NPU is built with g++ 12 or newer for torch_npu 2.13"
        raise UserError(f"{shown}\n{done.stderr}\n  rule:   {rule}\n  remedy: see what the compiler says")
    return re.findall(pattern, done.stdout) if pattern else []


def _wheel(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    return Path(spec.origin).parent
