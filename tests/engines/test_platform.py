"""Which dtype a device computes in, and what is said about devices that cannot."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines import extension, platform, sources
from engines.cpu.offers import offers
from engines.platform import (
    Host,
    accelerator_blockers,
    cuda_blockers,
    describe,
    fit_block_size,
    is_bf16_supported,
    measure,
    platforms,
    probe,
    resolve_dtype,
    torch_device,
    untried,
)


def cuda(sm: tuple[int, int] | None, version: str | None = "12.8") -> Host:
    return Host(name="x", device="cuda", compute_capability=sm, cuda=version)


def cpu(*dtypes: str, name: str = "this") -> Host:
    return Host(name=name, device="cpu", cpu_dtypes=frozenset({"float32", *dtypes}))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (cuda((9, 0)), True),
        (cuda((8, 0)), True),
        (cuda((7, 5)), False),
        (cuda((7, 0)), False),
        (cuda((8, 0), "10.2"), False),
        (cuda((8, 0), None), True),
        (cuda(None), False),
        (Host(name="x", device="rocm"), True),
        (Host(name="x", device="xpu"), True),
        (Host(name="x", device="ascend"), True),
        (Host(name="x", device="maca"), True),
        (Host(name="x", device="camb"), True),
        (cpu("bfloat16"), True),
        (cpu(), False),
    ],
)
def test_is_bf16_supported(host: Host, expected: bool) -> None:
    assert is_bf16_supported(host) is expected


SM75 = cuda((7, 5))
DTYPES = [
    # wanted, checkpoint, host, on the CPU, resolved, a note
    ("auto", "bfloat16", cuda((8, 0)), False, "bfloat16", None),
    ("auto", "float16", cuda((8, 0)), False, "float16", None),
    ("auto", "float32", cuda((8, 0)), False, "float32", None),
    ("auto", "bfloat16", SM75, False, "float16", "dtype float16 instead of the checkpoint's bfloat16: sm 7.5"),
    ("bfloat16", "float16", SM75, False, "bfloat16", None),
    ("float32", "bfloat16", SM75, False, "float32", None),
    (
        "auto",
        "float64",
        SM75,
        False,
        "float32",
        "dtype float32: the checkpoint's is float64, which is none that engines",
    ),
    ("auto", "float8_e4m3fn", cpu(), True, "float32", "dtype float32: the checkpoint's is float8_e4m3fn"),
    ("auto", "bfloat16", cpu("bfloat16"), True, "bfloat16", None),
    ("auto", "bfloat16", cpu(), True, "float32", "this CPU has no bfloat16 instructions, float32 is faster"),
    ("auto", "float16", cpu("bfloat16"), True, "float32", "this CPU has no float16 instructions"),
    ("auto", "float16", cpu("float16"), True, "float16", None),
    ("auto", "float32", cpu("bfloat16"), True, "float32", None),
    ("bfloat16", "float32", cpu(), True, "bfloat16", None),
    ("auto", "bfloat16", cuda((9, 0)), True, "float32", "no bfloat16 instructions"),
    ("auto", "bfloat16", Host(name="x", device="rocm"), False, "bfloat16", None),
]


@pytest.mark.parametrize(("wanted", "checkpoint", "host", "on_cpu", "dtype", "note"), DTYPES)
def test_resolve_dtype(wanted: str, checkpoint: str, host: Host, on_cpu: bool, dtype: str, note: str | None) -> None:
    resolved, said = resolve_dtype(wanted, checkpoint, host, on_cpu)
    assert resolved == dtype
    assert said is None if note is None else note in str(said)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (cuda((8, 0)), []),
        (cuda((7, 0)), ["sm 7.0 < 8.0: use a newer GPU, or backend=cpu"]),
        (cuda(None), ["compute capability unknown: host.compute_capability is not given"]),
        (cpu(), ["cuda is not available. No NVIDIA driver was found: install one, or use backend=cpu"]),
        (cpu(name="laptop"), ["cuda is not available. Host laptop has no accelerator: use backend=cpu"]),
        (Host(name="x", device="rocm"), ["device rocm: expected cuda; use backend=triton or backend=cpu"]),
        (Host(name="this", device="cpu", problems=("the driver sleeps",)), ["the driver sleeps"]),
    ],
)
def test_cuda_blockers(host: Host, expected: list[str]) -> None:
    assert cuda_blockers(host, (8, 0)) == expected


def test_a_described_host_is_what_was_written() -> None:
    host = describe("box", "cuda", "H200", 8, "9.0", 141.0, 4800.0, 989.0, 67.0, "13.0", 30.0)
    assert host.described and host.compute_capability == (9, 0)
    assert (host.memory_bytes, host.bytes_s, host.flops_16bit) == (141 << 30, 4.8e12, 9.89e14)
    assert host.cpu_memory_bytes == 0


def test_a_described_cpu_has_bfloat16_when_it_is_faster() -> None:
    assert "bfloat16" in describe("a", "cpu", tflops_16bit=2.0, tflops_32bit=1.0).cpu_dtypes
    assert "bfloat16" not in describe("a", "cpu", tflops_16bit=1.0, tflops_32bit=1.0).cpu_dtypes


@pytest.mark.parametrize("text", ["9", "90", "sm_90", "9.", ".0", ""])
def test_a_compute_capability_has_two_numbers(text: str) -> None:
    with pytest.raises(ValueError, match=r'host.compute_capability: .*; expected "<major>.<minor>"'):
        describe("box", "cuda", compute_capability=text)


def test_this_machine() -> None:
    host = probe()
    assert host.name == "this" and not host.described
    assert host.cpu_cores >= 1 and "float32" in host.cpu_dtypes
    assert 0 < host.cpu_memory_bytes <= (host.memory_bytes if host.device == "cpu" else 1 << 60)


def test_rates_are_measured_where_unknown_and_only_there() -> None:
    host = measure(Host(name="this", device="cpu"), "float32")
    assert 1e8 < host.bytes_s < 1e13 and 1e8 < host.flops_32bit < 1e16
    described = describe("box", "cpu")
    assert measure(described, "float32") is described


def test_compiled_libraries_are_found_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in platform.LIBRARIES.values():
        monkeypatch.delenv(library.disable, raising=False)
    there = {name: replace(library, path=tmp_path / library.path.name) for name, library in platform.LIBRARIES.items()}
    monkeypatch.setattr(platform, "LIBRARIES", there)
    assert platform.installed_extensions() == frozenset()
    there["cpu"].path.touch()
    assert platform.installed_extensions() == {"cpu"}


def test_a_stale_library_is_known_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csrc = tmp_path / "csrc" / "cpu"
    csrc.mkdir(parents=True)
    (csrc / "ops.cpp").write_text("int one;")
    library = replace(extension.CPU, path=tmp_path / "_cpu_ops.so", sources=csrc)
    monkeypatch.delenv(library.disable, raising=False)
    monkeypatch.setattr(platform, "LIBRARIES", {"cpu": library})
    library.path.write_bytes(f"...{sources.MARK}{sources.digest(csrc)}...".encode())
    assert probe().stale == {} and not offers(probe()).blockers
    (csrc / "ops.cpp").write_text("int two;")
    host = probe()
    assert re.match(r"_cpu_ops.so: built from sources with digest .*; run 'python setup.py", host.stale["cpu"])
    assert offers(host).blockers == (host.stale["cpu"],)
    monkeypatch.setenv(library.disable, "1")
    assert probe().stale == {} and not offers(probe()).blockers


def test_deciding_loads_no_torch() -> None:
    """In an own process: everything up to a verdict without torch, transformers or triton."""
    code = (
        "import sys, engines.platform as p, engines.costs, engines.checkpoint, engines.capability\n"
        "from engines import discover\n"
        "p.driver_present = lambda platform: False\n"
        "host = p.probe(); discover.families(); discover.transformers_causal_architectures()\n"
        "import importlib\n"
        "[importlib.import_module(f'engines.{b}.offers').offers(host) for b in discover.backends()]\n"
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def stand_in_torch(
    monkeypatch: pytest.MonkeyPatch, kind: str, built: bool = True, names: tuple[str, ...] = (), cuda: str = "13.0"
) -> None:
    """A torch on a machine with one kind of accelerator: its driver, its module and, where it has one, its package."""
    there = platforms()[kind]
    module = SimpleNamespace(
        is_available=lambda: bool(names),
        device_count=lambda: len(names),
        mem_get_info=lambda device: (140 << 30, 141 << 30),
        get_device_name=lambda device: names[device],
        get_device_capability=lambda device: (9, 0),
        get_arch_list=lambda: ["sm_90"],
    )
    torch = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=None))
    if built:
        setattr(torch, there.module, module)
        setattr(torch.version, there.version or "unused", cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)
    if there.package is not None:
        monkeypatch.setitem(sys.modules, there.package, SimpleNamespace() if built else None)
    monkeypatch.setattr(platform, "driver_present", lambda platform: platform is there)


@pytest.mark.parametrize("kind", platforms())
def test_devices_that_torch_sees(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, kind, names=("A chip",) * 2)
    host = probe()
    assert (host.device, host.device_name, host.num_devices) == (kind, "A chip", 2)
    assert (host.memory_bytes, host.free_bytes) == (141 << 30, 140 << 30)
    assert host.cpu_cores >= 1 and host.cpu_memory_bytes > 0 and host.problems == ()
    assert torch_device(host) == {"ascend": "npu", "camb": "mlu", "xpu": "xpu"}.get(kind, "cuda")
    assert is_bf16_supported(host)
    assert accelerator_blockers(host, (8, 0)) == []
    assert (cuda_blockers(host, (8, 0)) == []) is (kind == "cuda")
    assert (untried(host) is None) is (kind == "cuda")
    if kind == "cuda":
        assert (host.compute_capability, host.cuda) == ((9, 0), "13.0")


def test_every_kind_of_device_that_a_host_may_have_is_a_platform() -> None:
    assert list(platforms()) == ["cuda", "ascend", "camb", "maca", "rocm", "xpu"]
    for found in platforms().values():
        assert found.block_sizes == tuple(sorted(found.block_sizes))
        assert found.drivers and found.remedy and found.graph.endswith("Graph")
        assert platform.platform_of(found.module).module == found.module


@pytest.mark.parametrize("kind", platforms())
def test_a_driver_without_a_torch_that_can_use_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, kind, built=False)
    host = probe()
    there = platforms()[kind]
    assert host.device == "cpu"
    assert cuda_blockers(host, (8, 0)) == list(host.problems)
    missing = f"but {there.package} is not (" if there.package else "but torch 2.13.0 was built without "
    assert host.problems[0].startswith(f"{kind} is not available. An {there.maker} driver is here, {missing}")
    assert host.problems[0].endswith(f": {there.remedy}")


def test_a_driver_whose_devices_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(platform, "_driver_cuda", lambda: None)
    assert probe().problems == ("cuda is not available. Torch 2.13.0 finds no device (CUDA_VISIBLE_DEVICES is '')",)


def test_a_driver_older_than_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, "cuda")
    monkeypatch.setattr(platform, "_driver_cuda", lambda: "12.4")
    assert probe().problems == (
        "cuda is not available. The driver supports CUDA 12.4, torch 2.13.0 was built for 13.0: update the driver, or "
        "install a torch built for CUDA 12",
    )


def test_several_different_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, "cuda", names=("H200", "A100", "H200"))
    host = probe()
    assert host.device == "cuda" and host.num_devices == 2
    assert host.problems == (
        "several different devices: 2 x H200, 1 x A100; expected equal ones, so only H200 is counted on; set "
        "CUDA_VISIBLE_DEVICES to the devices of one kind",
    )


@pytest.mark.parametrize(
    ("device", "asked", "fitting"), [("camb", 32, 16), ("ascend", 256, 128), ("ascend", 8, 16), ("cuda", 8, 8)]
)
def test_block_sizes_that_a_device_can_have(device: str, asked: int, fitting: int) -> None:
    found, why = fit_block_size(asked, Host("x", device))
    assert found == fitting
    assert (why is None) is (found == asked)
    if why:
        assert why.startswith(f"block_size {fitting} instead of {asked}: {device} has ")


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 0), ["sm_70", "sm_80"], True),
        ((12, 1), ["sm_90", "compute_90"], True),
        ((12, 1), ["sm_90", "sm_90a", "compute_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),
    ],
)
def test_a_torch_without_code_for_the_device_is_named(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    """An empty list is a build that does not say."""
    said = platform._no_code(capability, built_for)
    assert (said is None) == runs
    if said is not None:
        assert said.startswith(f"has no code for sm {capability[0]}.{capability[1]}, only for {', '.join(built_for)}: ")
