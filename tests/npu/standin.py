"""A CANN stand-in: what lets the real torch_npu be imported, and the real torchair convert, on a machine without CANN.

The wheel is fetched once, the symbols that its libraries lack are listed, and libraries that define them are compiled:
success everywhere, a few answers (cann_answers.c), an error where a device would be needed. Both are kept in the cache
folder. Run as a script it prepares everything and says where it lies.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "wheels"))

import fetched
from fetched import Unavailable

VERSION = "2.13.0"
ANSWERS = Path(__file__).with_name("cann_answers.c")
LIBRARIES = (
    "hccl", "ascendcl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "fmk_parser", "ascend_protobuf",
    "atb",
)  # fmt: skip
# Looked up by name while torch_npu starts, so that no symbol table tells of them.
LOOKED_UP = (
    "aclSetCompileopt", "aclrtCtxSetSysParamOpt", "aclrtSetDeviceSatMode", "aclrtSetOpExecuteTimeOut",
    "aclrtSetOpWaitTimeout", "aclrtDestroyStreamForce", "HcclGetRootInfo", "HcclCommInitRootInfo",
    "HcclCommInitRootInfoConfig", "HcclCommDestroy", "HcclGetCommAsyncError",
)  # fmt: skip
# Only with a device: memory that is read or written, kernels, and GE's session beyond its construction.
NEEDS_A_DEVICE = (
    "aclrtMalloc", "aclrtMemcpy", "aclrtMemset", "aclopCompileAndExecute", "rtKernelLaunch", "_ZN2ge7Session8AddGraph",
    "_ZN2ge7Session12CompileGraph", "_ZN2ge7Session8RunGraph", "_ZN2ge7Session23RunGraph", "_ZN3atb15CreateOperation",
)  # fmt: skip


def prepare() -> tuple[Path, Path]:
    """The folders of torch_npu, unpacked, and of the stand-in's libraries; Unavailable with the reason for none."""
    folder = fetched.folder("llama_fn_npu", "torch_npu", VERSION)
    tag = hashlib.sha256(ANSWERS.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    site = fetched.finished(folder / "site", lambda made: fetched.wheel("torch_npu", VERSION, made))
    libraries = fetched.finished(folder / f"lib-{tag}", lambda made: _build(site, made))
    return site, libraries


def environment() -> dict[str, str]:
    """The environment in which `import torch_npu` works. torch_npu itself is never put into the project's own."""
    site, libraries = prepare()
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), "LD_LIBRARY_PATH": str(libraries),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }  # fmt: skip


def _symbols(library: Path, kind: str) -> set[str]:
    done = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[-1].split("@")[0] for row in rows if kind != "--undefined-only" or row[-2] == "U"}


def missing_symbols(site: Path) -> list[str]:
    """What the wheel's libraries need and neither they, torch, Python nor the system define."""
    npu = site / "torch_npu"
    wheel = [*npu.glob("*.so"), *npu.glob("lib/*.so"), *npu.glob("dynamo/torchair/core/*.so")]
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_libraries = [*Path(spec.origin).parent.glob("lib/*.so*")]
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    system = [p for p in loaded if p.name.startswith(("libc.", "libm.", "libdl", "libpthread", "librt", "ld-"))]
    cxx = subprocess.run(["gcc", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True).stdout.strip()
    gcc = subprocess.run(["gcc", "-print-file-name=libgcc_s.so.1"], capture_output=True, text=True).stdout.strip()
    defined: set[str] = set()
    for library in [*wheel, *torch_libraries, *system, Path(cxx), Path(gcc)]:
        defined |= _symbols(library, "--defined-only")
    needed = {symbol for library in wheel for symbol in _symbols(library, "--undefined-only")}
    return sorted(s for s in needed - defined if not s.startswith(("Py", "_Py")))


def _source(symbols: list[str]) -> str:
    answered = ANSWERS.read_text()
    lines = ["void needs_a_device(const char *name);"]
    for symbol in symbols:
        if f" {symbol}(" in answered or f"*{symbol}(" in answered:
            continue
        body = f'needs_a_device("{symbol}");' if symbol.startswith(NEEDS_A_DEVICE) else ""
        lines.append(f"long {symbol}(void) {{ {body} return 0; }}")
    return "\n".join(lines) + "\n"


def _build(site: Path, folder: Path) -> None:
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"no {tool} on the path: the CANN stand-in is compiled with a C compiler and binutils")
    generated = folder / "cann_rest.c"
    generated.write_text(_source([*missing_symbols(site), *LOOKED_UP]))
    first = folder / f"lib{LIBRARIES[0]}.so"
    _compile(first, [str(ANSWERS), str(generated)])
    for name in LIBRARIES[1:]:
        _compile(folder / f"lib{name}.so", ["-x", "c", "/dev/null", "-L", str(folder), f"-l{LIBRARIES[0]}"])


def _compile(out: Path, sources: list[str]) -> None:
    flags = ["-shared", "-fPIC", "-O1", "-w", "-Wl,--no-as-needed", f"-Wl,-soname,{out.name}"]
    done = subprocess.run(["gcc", *flags, "-o", str(out), *sources], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"the CANN stand-in does not compile:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    print(*prepare())
