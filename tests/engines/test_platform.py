"""Which dtype a device computes in, and what is said about devices that cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines import platform
from engines.platform import Host, cuda_blockers, describe, is_bf16_supported, measure, probe, resolve_dtype


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
        (cuda((7, 0)), ["sm 7.0 < 8.0"]),
        (cuda(None), ["compute capability unknown: host.compute_capability is not given"]),
        (cpu(), ["no CUDA device: no NVIDIA driver was found"]),
        (cpu(name="laptop"), ["no CUDA device: host laptop has none"]),
        (Host(name="x", device="rocm"), ["device rocm: expected cuda"]),
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
    monkeypatch.setattr(platform, "__file__", str(tmp_path / "platform.py"))
    assert platform.installed_extensions() == frozenset()
    (tmp_path / "_cpu_ops.so").touch()
    assert platform.installed_extensions() == {"cpu"}


def test_deciding_loads_no_torch() -> None:
    """In an own process: everything up to a verdict without torch, transformers or triton."""
    code = (
        "import sys, engines.platform as p, engines.costs, engines.checkpoint, engines.capability\n"
        "from engines import discover\n"
        "p.driver_present = lambda: False\n"
        "host = p.probe(); discover.families(); discover.transformers_causal_architectures()\n"
        "import importlib\n"
        "[importlib.import_module(f'engines.{b}.offers').offers(host) for b in discover.backends()]\n"
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def stand_in_torch(monkeypatch: pytest.MonkeyPatch, version: str | None, devices: int) -> None:
    """A torch that sees so many H200s; version: the CUDA it was built with."""
    available = SimpleNamespace(
        is_available=lambda: devices > 0,
        device_count=lambda: devices,
        mem_get_info=lambda device: (140 << 30, 141 << 30),
        get_device_name=lambda device: "NVIDIA H200",
        get_device_capability=lambda device: (9, 0),
    )
    torch = SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=version), cuda=available)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(platform, "driver_present", lambda: True)


def test_devices_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, "13.0", 2)
    host = probe()
    assert (host.device, host.device_name, host.num_devices) == ("cuda", "NVIDIA H200", 2)
    assert (host.compute_capability, host.cuda, host.free_bytes) == ((9, 0), "13.0", 140 << 30)
    assert host.cpu_cores >= 1 and host.cpu_memory_bytes > 0
    assert cuda_blockers(host, (8, 0)) == []


def test_a_driver_without_a_torch_that_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, None, 0)
    host = probe()
    assert host.device == "cpu"
    assert cuda_blockers(host, (8, 0)) == [
        "an NVIDIA driver is here, but torch 2.13.0 was built without CUDA: install a CUDA build"
    ]


def test_a_driver_whose_devices_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_torch(monkeypatch, "13.0", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe().problems == ("no CUDA device: torch 2.13.0 finds none (CUDA_VISIBLE_DEVICES is '')",)
