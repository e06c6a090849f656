"""Descriptions of devices: from data sheets, or measured on this machine and stored.

A data sheet's peak is not what kernels reach. The presets take 0.6 to 0.75 of it, which is what
large products of a training step come to; they are marked as not calibrated, and say which of two
plans is faster rather than how long a step takes. ``wrappers.calibrate()`` measures the device at
hand and stores what it has found in a file, so that it is measured once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import platform
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from wrappers import _device
from wrappers.plan.budget import capacity_bytes
from wrappers.plan.records import Hardware

__all__ = ["PRESETS", "cache_file", "device_key", "find_hardware", "load", "save"]

#: Version of the file's format, and of what the figures in it mean.
FILE_VERSION = 1

_TERA = 1e12
_GIGA = 1e9
_GIB = 1024**3


def _gpu(
    name: str,
    *,
    tensor_cores: float,
    tf32: float,
    float32: float,
    float64: float,
    memory: float,
    link: float,
    memory_gib: float,
    reached: float = 0.7,
    launch_us: float = 2.5,
) -> Hardware:
    """A GPU from its data sheet: peaks in TFLOP/s without sparsity, bandwidths in GB/s.

    Of products a share of ``reached`` counts; of the memory's bandwidth 0.85, which is what
    streaming kernels come to; of the link's 0.8, which is what is left of PCIe by its packets.
    """
    rates = {
        "bfloat16": tensor_cores,
        "float16": tensor_cores,
        "tf32": tf32,
        "float32": float32,
        "float64": float64,
    }
    return Hardware(
        name,
        {dtype: reached * _TERA * peak for dtype, peak in rates.items()},
        0.85 * _GIGA * memory,
        h2d_bytes_per_s=0.8 * _GIGA * link,
        d2h_bytes_per_s=0.8 * _GIGA * link,
        launch_us=launch_us,
        memory_bytes=int(memory_gib * _GIB),
        efficiency={"attention": 0.7, "attention_backward": 0.55, "convolution": 0.8},
        half_sides={"matmul": 32.0, "bmm": 32.0, "attention": 32.0, "attention_backward": 32.0},
        # Estimates: the host runs ahead of its device, which hides most of the engine's cost.
        region_us=20.0,
        record_us=0.5,
        replay_us=1.0,
    )


#: From NVIDIA's data sheets; PCIe 4.0 x16 has 32 GB/s a direction, 5.0 twice that.
_LISTED = (
    # A100 80GB SXM: 312 TFLOP/s bf16 and fp16, 156 TF32, 19.5 fp32, 19.5 fp64 (tensor cores);
    # 2,039 GB/s.
    _gpu(
        "A100",
        tensor_cores=312,
        tf32=156,
        float32=19.5,
        float64=19.5,
        memory=2039,
        link=32,
        memory_gib=80,
        reached=0.75,
    ),
    # H100 SXM: 989.4 TFLOP/s bf16 and fp16, 494.7 TF32, 66.9 fp32, 66.9 fp64 (tensor cores);
    # 3,350 GB/s.
    _gpu(
        "H100",
        tensor_cores=989.4,
        tf32=494.7,
        float32=66.9,
        float64=66.9,
        memory=3350,
        link=64,
        memory_gib=80,
    ),
    # H200 SXM: the H100's processor, 141 GB at 4,800 GB/s.
    _gpu(
        "H200",
        tensor_cores=989.4,
        tf32=494.7,
        float32=66.9,
        float64=66.9,
        memory=4800,
        link=64,
        memory_gib=141e9 / _GIB,
    ),
    # L4: 121 TFLOP/s bf16 and fp16 (242 with sparsity), 60 TF32, 30.3 fp32, 0.49 fp64; 300 GB/s;
    # 24 GB. Its 72 W hold the clock below the peak's, so less is reached.
    _gpu(
        "L4",
        tensor_cores=121,
        tf32=60,
        float32=30.3,
        float64=0.49,
        memory=300,
        link=32,
        memory_gib=24,
        reached=0.6,
    ),
    # RTX 4090: 165.2 TFLOP/s bf16 and fp16 with fp32 sums, 82.6 TF32, 82.6 fp32, 1.29 fp64;
    # 1,008 GB/s; 24 GB.
    _gpu(
        "RTX4090",
        tensor_cores=165.2,
        tf32=82.6,
        float32=82.6,
        float64=1.29,
        memory=1008,
        link=32,
        memory_gib=24,
    ),
    # A server's core at 3 GHz with two 8-wide multiply-adds has a peak of 96 GFLOP/s in fp32; 0.7
    # of it. One thread; no bf16 units, so the same for it. The rest is of that order; `calibrate`
    # measures it.
    Hardware(
        "CPU",
        {"float32": 67 * _GIGA, "bfloat16": 67 * _GIGA, "float64": 33 * _GIGA},
        20 * _GIGA,
        launch_us=3.0,
        region_us=300.0,
        record_us=6.0,
        replay_us=6.0,
        efficiency={"attention": 0.9, "attention_backward": 0.9, "bmm": 0.9, "convolution": 0.6},
        half_sides={"bmm": 12.0, "attention": 12.0, "attention_backward": 8.0},
        attention_block=512,
        element_ns={
            "transcendental": 0.6,
            "softmax": 0.8,
            "norm": 0.4,
            "reduction": 0.25,
            "copy": 0.2,
            "transpose": 0.6,
            "random": 4.5,
            "gather": 0.3,
        },
        fresh_bytes_per_s=3 * _GIGA,
        fresh_min_bytes=32 * 1024**2,
    ),
)

#: The descriptions that come with the package, by name.
PRESETS: dict[str, Hardware] = {hardware.name: hardware for hardware in _LISTED}

#: What the device at hand may be called.
THIS = "this"


def find_hardware(
    hardware: Hardware | str | None = None, device: torch.device | None = None
) -> Hardware:
    """A description of a device.

    Args:
        hardware: One, which is returned as it is; the name of a preset in any case; or None or
            ``"this"`` for the device at hand: what ``wrappers.calibrate()`` has stored for it, else
            the preset that its name contains.
        device: The device at hand; by default the accelerator, or the CPU where there is none.

    Returns:
        The description.

    Raises:
        ValueError: There is no preset of this name; the text names those that come close. Or a
            description has no rate of matrix products, or no bandwidth of memory.
    """
    if isinstance(hardware, Hardware):
        return _checked(hardware)
    if hardware is None or hardware.lower() == THIS:
        return load(device) or _preset_of(device or _device.default_device())
    by_key = {_squeeze(name): preset for name, preset in PRESETS.items()}
    found = by_key.get(_squeeze(hardware))
    if found is None:
        close = difflib.get_close_matches(_squeeze(hardware), by_key, n=3, cutoff=0.5)
        meant = f" Did you mean {' or '.join(by_key[key].name for key in close)}?" if close else ""
        raise ValueError(
            f"no hardware is called {hardware!r}.{meant} Known are {', '.join(PRESETS)}, and "
            f"{THIS!r} for the device at hand; or give a wrappers.Hardware"
        )
    return found


def _checked(hardware: Hardware) -> Hardware:
    rates = hardware.matmul_flops
    if rates and min(rates.values()) > 0 and hardware.memory_bytes_per_s > 0:
        return hardware
    raise ValueError(
        f"the hardware {hardware.name!r} needs matmul_flops of a data type and "
        f"memory_bytes_per_s, above 0; got {rates} and {hardware.memory_bytes_per_s}"
    )


def _squeeze(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _is_called(name: str, preset: str) -> bool:
    """Whether a maker's name has that of a preset in it: an L40S is no L4, an RTX A1000 no A100."""
    parts = r"[\W_]*".join(re.findall(r"[a-z]+|\d+", preset.lower()))
    return re.search(rf"(?<![a-z])g?{parts}(?!\d)", name.lower()) is not None


def _preset_of(device: torch.device) -> Hardware:
    """The preset for a device that was not calibrated; its memory is the device's own."""
    name = _device.own_name(device) or "CPU"
    found = next((p for key, p in PRESETS.items() if _is_called(name, key)), None)
    if found is None:
        found = PRESETS["A100"]
        warnings.warn(
            f"no preset for {_device.own_name(device)}: times are those of an {found.name}. Run "
            "wrappers.calibrate() once, or pass hardware=",
            stacklevel=3,
        )
    return dataclasses.replace(found, memory_bytes=capacity_bytes(device) or found.memory_bytes)


# --- The file


def cache_file() -> Path:
    """Where ``wrappers.calibrate()`` stores what it has measured.

    ``hardware.json`` in ``$WRAPPERS_CACHE_DIR``, else in ``~/.cache/wrappers``.
    """
    folder = os.environ.get("WRAPPERS_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "wrappers") / "hardware.json"


def device_key(device: torch.device | None = None) -> str:
    """What figures hold for: the device, the number of threads for a CPU, torch's version."""
    device = _device.default_device() if device is None else device
    name = _device.own_name(device)
    if name is None:
        name = f"{_processor_name()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):  # ARM's processors have no such line.
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load(device: torch.device | None = None) -> Hardware | None:
    """What was stored for a device; None if nothing was. A file that is damaged only warns."""
    entries = _read(cache_file())
    entry = entries.get(device_key(device))
    if entry is None:
        return None
    try:
        return Hardware(**entry)
    except TypeError as error:
        _warn_unreadable(cache_file(), error)
        return None


def save(hardware: Hardware, device: torch.device | None = None) -> Path:
    """Store a description for a device; what is there for others stays.

    The file is replaced at once, so that a reader sees the old one or the new one.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What cannot be read is replaced.
        entries = _read(path)
    entries[device_key(device)] = dataclasses.asdict(hardware)
    text = json.dumps({"version": FILE_VERSION, "devices": entries}, indent=1)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return path


def _read(path: Path) -> dict[str, Any]:
    """The entries of a file, by device; none where there is no file that can be used."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != FILE_VERSION:
            raise ValueError(f"its version is {content['version']}, expected {FILE_VERSION}")
        return dict(content["devices"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn_unreadable(path, error)
        return {}


_warned: set[str] = set()


def _warn_unreadable(path: Path, error: Exception) -> None:
    if str(path) in _warned:
        return
    _warned.add(str(path))
    warnings.warn(
        f"{path} is not used: {error or type(error).__name__}. Run wrappers.calibrate() to write "
        "it anew",
        stacklevel=4,
    )
