"""The machine that a plan is for: this one, probed, or one described in YAML.

torch is imported inside `probe`, and only when an accelerator's driver is there, and inside `measure`: deciding for a
CPU takes a few milliseconds. Kinds of accelerators are the modules of engines/platforms.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform as python_platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from engines import discover, extension

GIB = 1 << 30
CUDA_EXTENSION, CPU_EXTENSION = "cuda", "cpu"
LIBRARIES = {CPU_EXTENSION: extension.CPU, CUDA_EXTENSION: extension.CUDA}


@dataclass(frozen=True)
class Platform:
    """A kind of accelerator: how torch and Triton reach it. A module of engines/platforms has one, by this name."""

    maker: str
    module: str
    """torch.<module>, which is the type of its torch.device too."""
    drivers: tuple[str, ...]
    """Files and programs, any of which shows that a driver is installed."""
    visible: str
    """Environment variable that names the devices which a process may use."""
    remedy: str
    """How to get a torch that knows the device."""
    graph: str
    """Class in torch.<module> for captured steps; torch.<module>.graph captures into it."""
    collectives: str
    """Backend of torch.distributed."""
    version: str | None = None
    """torch.version.<version> is set where torch was built for it; None: `package` brings it."""
    package: str | None = None
    """Imported so that torch knows the device."""
    bfloat16_since: tuple[int, int] | None = None
    """Compute capability; None: all have it."""
    float64: bool = True
    """Whether its kernels compute in float64; if not, what needs it (drawing tokens) is done on the processor."""
    block_sizes: tuple[int, ...] = ()
    """Tokens in a block of the KV cache, ascending; empty: any power of two."""


@functools.cache
def platforms() -> dict[str, Platform]:
    """Kinds of accelerators by the name that configurations have for them; cuda first, as most torch builds are its."""
    found = {name: module.PLATFORM for name, module in discover.modules("engines.platforms").items()}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "cuda", item[0])))


def platform_of(device_type: str) -> Platform:
    """The platform behind a type of torch.device. Those that share one (cuda) share what is asked of it here."""
    return next(platform for platform in platforms().values() if platform.module == device_type)


@dataclass(frozen=True)
class Host:
    """One machine with `num_devices` equal devices. A size or rate of 0 means unknown."""

    name: str
    """`this`, or the name of a described host."""
    device: str
    """cuda, rocm, xpu, ascend, maca or camb; cpu when there is no accelerator."""
    device_name: str = ""
    num_devices: int = 1
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int = 0
    """Of one device; of the machine for cpu."""
    free_bytes: int = 0
    """What is free of it now; for a described host all of it."""
    bytes_s: float = 0.0
    """Read bandwidth of one device."""
    flops_16bit: float = 0.0
    """Matrix rate of one device in float16 and bfloat16, operations a second."""
    flops_32bit: float = 0.0
    cuda: str | None = None
    """CUDA version, as "13.0"."""
    price_per_hour: float | None = None
    cpu_name: str = ""
    cpu_cores: int = 0
    cpu_memory_bytes: int = 0
    """Free for use, of the machine; 0 where a described host with an accelerator does not say."""
    cpu_dtypes: frozenset[str] = frozenset({"float32"})
    """dtypes that the processor multiplies natively."""
    cpu_tiles: bool = False
    """Whether the compiled library multiplies on the processor's matrix unit (AMX). Not known of a described host."""
    extensions: frozenset[str] = frozenset()
    """Compiled libraries that are installed: cpu, cuda. Assumed to be for a described host."""
    stale: Mapping[str, str] = field(default_factory=dict)
    """Those of them that would be refused when they are loaded -> why. None of a described host."""
    triton: bool = False
    """Whether triton can be imported."""
    c_compiler: bool = True
    """Whether there is one, as triton needs it to launch what it compiles. Assumed of a described host."""
    nvcc: bool = False
    """Whether there is a CUDA compiler, for libraries that compile when they are first used."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Installed modules that engines/triton/libraries names -> version. None of a described host."""
    problems: tuple[str, ...] = ()
    """What stands between this machine and its accelerators, in sentences."""

    @property
    def described(self) -> bool:
        return self.name != "this"


def describe(
    name: str,
    device: str,
    device_name: str = "",
    num_devices: int = 1,
    compute_capability: str | None = None,
    memory_gib: float = 0.0,
    memory_gb_s: float = 0.0,
    tflops_16bit: float = 0.0,
    tflops_32bit: float = 0.0,
    cuda: str | None = None,
    price_per_hour: float | None = None,
) -> Host:
    """A host as written down; the arguments are the keys of the configuration's group `host`.

    Raises ValueError, worded for a person, for a compute capability that is not "major.minor".
    """
    memory = round(memory_gib * GIB)
    on_cpu = device == "cpu"
    # A processor whose 16-bit rate is above its 32-bit rate has instructions for bfloat16.
    native = {"float32", "bfloat16"} if on_cpu and tflops_16bit > tflops_32bit else {"float32"}
    return Host(
        name=name,
        device=device,
        device_name=device_name,
        num_devices=num_devices,
        compute_capability=_capability(compute_capability),
        memory_bytes=memory,
        free_bytes=memory,
        bytes_s=memory_gb_s * 1e9,
        flops_16bit=tflops_16bit * 1e12,
        flops_32bit=tflops_32bit * 1e12,
        cuda=cuda,
        price_per_hour=price_per_hour,
        cpu_name=device_name if on_cpu else "",
        cpu_memory_bytes=memory if on_cpu else 0,
        cpu_dtypes=frozenset(native),
        extensions=frozenset({CPU_EXTENSION, CUDA_EXTENSION}),
        triton=True,
    )


def probe(price_per_hour: float | None = None) -> Host:
    """This machine."""
    name, dtypes, tiles = _processor()
    memory, free = _memory()
    extensions = installed_extensions()
    host = Host(
        name="this",
        device="cpu",
        device_name=name,
        memory_bytes=memory,
        free_bytes=free,
        price_per_hour=price_per_hour,
        cpu_name=name,
        cpu_cores=num_cores(),
        cpu_memory_bytes=free,
        cpu_dtypes=dtypes,
        cpu_tiles=tiles,
        extensions=extensions,
        stale={name: why for name in sorted(extensions) if (why := extension.stale(LIBRARIES[name]))},
        triton=importlib.util.find_spec("triton") is not None,
        c_compiler=bool(os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))),
        nvcc=bool(os.environ.get("CUDA_HOME") or shutil.which("nvcc")),
        packages=installed_packages(),
    )
    for kind, platform in platforms().items():
        if host.device == "cpu" and driver_present(platform):
            host = _with_accelerator(host, kind, platform)
    return host


def driver_present(platform: Platform) -> bool:
    """Whether a driver is installed: the question that decides whether torch is worth importing."""
    return any(
        Path(name).exists() if name.startswith("/") else shutil.which(name) is not None for name in platform.drivers
    )


def installed_extensions() -> frozenset[str]:
    """Compiled libraries that are there and not left out (engines.extension.reason), by name."""
    return frozenset(name for name, library in LIBRARIES.items() if extension.reason(library) is None)


def installed_packages() -> dict[str, str]:
    """Versions of the modules that libraries of the Triton engine are made of, of those that are here; imports none."""
    libraries = discover.modules("engines.triton.libraries").values()
    wanted = [named for library in libraries for named in library.PACKAGES.items()]
    return {module: _version(name) for module, name in wanted if importlib.util.find_spec(module) is not None}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of no known version"


def is_bf16_supported(host: Host, on_cpu: bool = False) -> bool:
    """Whether the host's device, or its processor, multiplies bfloat16 natively (NVIDIA: sm 8.0 and CUDA 11)."""
    if on_cpu or host.device == "cpu":
        return "bfloat16" in host.cpu_dtypes
    since = platforms()[host.device].bfloat16_since
    if since is None:
        return True
    recent = host.cuda is None or int(host.cuda.split(".")[0]) >= 11
    return recent and host.compute_capability is not None and host.compute_capability >= since


def resolve_dtype(wanted: str, checkpoint: str, host: Host, on_cpu: bool) -> tuple[str, str | None]:
    """(dtype to compute in, why if it is neither what was asked for nor the checkpoint's).

    An explicit dtype is returned as it is: whether the device has it is the engine's verdict, not a matter of choice.
    """
    if wanted != "auto":
        return wanted, None
    where = "this CPU" if on_cpu and not host.described else (host.cpu_name or "this CPU" if on_cpu else _device(host))
    if checkpoint not in ("float32", "float16", "bfloat16"):
        return "float32", f"dtype float32: the checkpoint's is {checkpoint}, which is none that engines compute in"
    if on_cpu:
        if checkpoint in host.cpu_dtypes or checkpoint == "float32":
            return checkpoint, None
        return (
            "float32",
            f"dtype float32: {where} has no {checkpoint} instructions, float32 is faster and loses nothing",
        )
    if checkpoint == "bfloat16" and not is_bf16_supported(host):
        return "float16", f"dtype float16 instead of the checkpoint's bfloat16: {where}"
    return checkpoint, None


def cuda_blockers(host: Host, minimum: tuple[int, int]) -> list[str]:
    """Why an engine for NVIDIA devices cannot run on this host, in sentences; [] if it can."""
    if host.problems and host.device == "cpu":
        return list(host.problems)
    if host.device == "cpu" and host.described:
        return [f"cuda is not available. Host {host.name} has no accelerator: use backend=cpu"]
    if host.device == "cpu":
        return ["cuda is not available. No NVIDIA driver was found: install one, or use backend=cpu"]
    if host.device != "cuda":
        return [f"device {host.device}: expected cuda; use backend=triton or backend=cpu"]
    if host.compute_capability is None:
        return ["compute capability unknown: host.compute_capability is not given"]
    if host.compute_capability < minimum:
        return [f"{_device(host)} < {minimum[0]}.{minimum[1]}: use a newer GPU, or backend=cpu"]
    return []


def accelerator_blockers(host: Host, minimum: tuple[int, int]) -> list[str]:
    """Why an engine for every accelerator cannot run on this host, in sentences; minimum: of NVIDIA devices."""
    return [] if host.device in platforms() and host.device != "cuda" else cuda_blockers(host, minimum)


def torch_device(host: Host) -> str:
    """The type of torch.device of the host's accelerator."""
    return platforms()[host.device].module


def untried(host: Host) -> str | None:
    """The sentence for accelerators that this code was written for and has not run on; None for the others."""
    if host.device in ("cpu", "cuda"):
        return None
    return (
        f"device {host.device}: written to its published interface and tested with a stand-in, never run on one: try a "
        "few rows first"
    )


def fit_block_size(block_size: int, host: Host) -> tuple[int, str | None]:
    """(a block size that the host's accelerator can have, why if it is not the one asked for)."""
    allowed = platforms()[host.device].block_sizes if host.device != "cpu" else ()
    if not allowed or block_size in allowed:
        return block_size, None
    fitting = max((size for size in allowed if size <= block_size), default=allowed[0])
    return fitting, f"block_size {fitting} instead of {block_size}: {host.device} has {', '.join(map(str, allowed))}"


def _device(host: Host) -> str:
    if host.compute_capability is not None:
        return f"sm {host.compute_capability[0]}.{host.compute_capability[1]}"
    return host.device


def _capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, dot, minor = str(text).partition(".")
    if not (major.isdigit() and dot and minor.isdigit()):
        raise ValueError(f'host.compute_capability: {text!r}; expected "<major>.<minor>", as "9.0"; quote it in YAML')
    return int(major), int(minor)


def num_cores() -> int:
    """Processors this process may use (affinity counts, as under Slurm and in containers)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> tuple[str, frozenset[str], bool]:
    """(name, dtypes with matrix instructions, Host.cpu_tiles) of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    dtypes = {"float32"}
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        dtypes.add("bfloat16")
    if flags & {"avx512_fp16", "amx_fp16", "asimdhp"}:
        dtypes.add("float16")
    tiles = {"amx_tile", "amx_bf16", "amx_int8"} <= flags and os.environ.get("CPU_OPS_ISA") in (None, "", "amx")
    name = fields.get("model name") or python_platform.processor() or python_platform.machine()
    return name, frozenset(dtypes), tiles


def _memory() -> tuple[int, int]:
    """(total, available) bytes, within the limit of this process's control group; (0, 0) when nothing says."""
    fields: dict[str, int] = {}
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields[key] = int(value.split()[0]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        fields["MemTotal"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = fields.get("MemTotal", 0)
    available = fields.get("MemAvailable", total)
    limit, used = _control_group()
    return (min(total, limit), min(available, max(limit - used, 0))) if limit else (total, available)


def _control_group() -> tuple[int, int]:
    """(memory limit, use) of this process's control group; (0, 0) without a limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(limit).read_text().strip()
            # Version 1 spells "no limit" as a number close to 2**63.
            if text.isdigit() and int(text) < 1 << 60:
                return int(text), int(Path(used).read_text())
        except OSError:
            continue
    return 0, 0


def _with_accelerator(host: Host, kind: str, platform: Platform) -> Host:
    """The host with the devices of that kind that torch sees, or with the reason why it sees none."""
    import torch

    driver = f"an {platform.maker} driver is here"
    if platform.package is not None:
        try:
            importlib.import_module(platform.package)
        except ImportError as error:
            return _with_problem(host, kind, f"{driver}, but {platform.package} is not ({error}): {platform.remedy}")
    built = platform.version is None or getattr(torch.version, platform.version, None) is not None
    module: Any = getattr(torch, platform.module, None)
    if not built or module is None:
        name = {"cuda": "CUDA", "rocm": "ROCm"}.get(kind, kind)
        return _with_problem(
            host, kind, f"{driver}, but torch {torch.__version__} was built without {name}: {platform.remedy}"
        )
    if not module.is_available():
        driver_cuda = _driver_cuda() if kind == "cuda" else None
        return _with_problem(host, kind, _no_device(platform, torch.__version__, torch.version.cuda, driver_cuda))
    if kind == "cuda" and (unserved := _no_code(module.get_device_capability(0), module.get_arch_list())):
        return _with_problem(host, kind, f"torch {torch.__version__} {unserved}")
    free, total = module.mem_get_info(0)
    names = [module.get_device_name(i) for i in range(module.device_count())]
    return replace(
        host,
        device=kind,
        device_name=names[0],
        num_devices=names.count(names[0]),
        compute_capability=module.get_device_capability(0) if kind == "cuda" else None,
        memory_bytes=total,
        free_bytes=free,
        cuda=torch.version.cuda if kind == "cuda" else None,
        problems=_different_devices(names, platform),
    )


def _with_problem(host: Host, kind: str, text: str) -> Host:
    return replace(host, problems=(*host.problems, f"{kind} is not available. {text[0].upper()}{text[1:]}"))


def _different_devices(names: list[str], platform: Platform) -> tuple[str, ...]:
    if len(set(names)) == 1:
        return ()
    counts = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return (
        f"several different devices: {counts}; expected equal ones, so only {names[0]} is counted on; set "
        f"{platform.visible} to the devices of one kind",
    )


def _no_code(capability: tuple[int, int], built_for: Sequence[str]) -> str | None:
    """Why torch's own kernels do not run on a device; built_for: as torch.cuda.get_arch_list gives it, ["sm_80", ...].

    Machine code runs on later minor versions of its generation, code for "compute_<arch>" is compiled by the driver for
    any later device.
    """
    own = 10 * capability[0] + capability[1]
    for name in built_for:
        kind, _, digits = name.partition("_")
        arch = int("".join(filter(str.isdigit, digits)) or 0)
        exact = digits[-1:].isalpha()  # "90a", "100f": no other device's
        if arch == own or (not exact and arch <= own and (kind == "compute" or arch // 10 == capability[0])):
            return None
    if not built_for:
        return None
    return (
        f"has no code for sm {capability[0]}.{capability[1]}, only for {', '.join(built_for)}: install a torch "
        "that was built for it (for sm 7.0 one for CUDA 12)"
    )


def _driver_cuda() -> str | None:
    """The CUDA version that the driver supports, as "12.4"; None where nvidia-smi does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=30)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"CUDA Version:\s*(\d+\.\d+)", done.stdout)
    return found[1] if found else None


def _no_device(platform: Platform, torch_version: str, runtime: str | None, driver: str | None) -> str:
    """Why torch finds no device although a driver is there. runtime, driver: CUDA versions."""
    visible = os.environ.get(platform.visible)
    if driver is not None and runtime is not None and int(driver.split(".")[0]) < int(runtime.split(".")[0]):
        return (
            f"the driver supports CUDA {driver}, torch {torch_version} was built for {runtime}: update the driver, or "
            f"install a torch built for CUDA {driver.split('.')[0]}"
        )
    program = next((name for name in platform.drivers if not name.startswith("/")), "the vendor's monitor")
    reason = f"{platform.visible} is {visible!r}" if visible is not None else f"run {program} to see why"
    return f"torch {torch_version} finds no device ({reason})"


def measure(host: Host, dtype: str) -> Host:
    """The host with rates for this machine's CPU, measured in about half a second where they are unknown.

    Loads torch. A product of two 1024 x 1024 matrices gives the operations, a sum over 64 MiB the bytes.
    """
    if host.described or host.device != "cpu" or host.bytes_s:
        return host
    import torch

    a = torch.rand(1024, 1024).to(getattr(torch, dtype))
    data = torch.rand(16 << 20)
    flops = 2 * 1024**3 / _best_s(lambda: a @ a)
    return replace(host, bytes_s=data.nbytes / _best_s(data.sum), flops_16bit=flops, flops_32bit=flops)


def _best_s(call: Callable[[], object]) -> float:
    """Shortest of a few runs."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def free_memory_bytes() -> int:
    """Memory of this machine that a process may take now, within its control group."""
    return _memory()[1]
