"""Hardware: what one GPU (or CPU rank) and its links can do at best; read from configs/hardware/NAME.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from checkpoints_convert.nearest_name import nearest
from parallel.shipped import shipped_folder

FOLDER = shipped_folder("hardware")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Peaks are nominal, per GPU; GB and TFLOP are powers of ten. How much of them is reached is said in efficiency.py."""

    name: str
    description: str
    peak_tflops: Mapping[str, float]  # dense, by precision
    sustained: float  # clock under full load, beside that of H100 and B200 against their nominal peaks
    memory_gb: float
    memory_bandwidth_gbs: float
    nvlink_domain: int  # ranks that reach each other without the network
    nvlink_gbs: float  # per rank and direction
    network_gbs: float
    nvlink_latency_us: float
    network_latency_us: float
    launch_us: float  # host time of one kernel
    reserved_gb: float  # of memory_gb, not for tensors
    measured: bool  # rates are what was reached, not nominal peaks

    @property
    def usable_bytes(self) -> float:
        """What tensors may occupy."""
        return 1e9 * (self.memory_gb - self.reserved_gb)

    def peak_flops(self, precision: str) -> float:
        """FLOP/s. Raises ValueError naming the hardware for a precision that it does not have."""
        if precision not in self.peak_tflops:
            raise ValueError(f"precision: {precision} is not one of {self.name}'s ({', '.join(self.peak_tflops)})")
        return 1e12 * self.peak_tflops[precision]


def known_hardware() -> list[str]:
    """Names of the files in configs/hardware."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def hardware_of_device(device_name: str) -> str:
    """The name in configs/hardware that a device's own name holds, as "NVIDIA H200" or "CPU" do. Raises ValueError when none is held."""
    held = [name for name in known_hardware() if name in device_name.lower()]
    if not held:
        raise ValueError(f"--hardware: {device_name!r} is none of {', '.join(known_hardware())}; expected one of them, or a .yaml file")
    return max(held, key=len)  # gb200, not b200


def read_hardware(name: str) -> Hardware:
    """By name, or from the path of a .yaml file. Raises ValueError naming the nearest known name, or the file and its key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"hardware: {name!r} does not exist; {nearest(name, known_hardware())}, or the path of a .yaml file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    return from_values(values, name=path.stem, source=path)


def from_values(values: Any, *, name: str, source: Path) -> Hardware:
    """Checked content of a hardware file. Raises ValueError naming file and key."""
    wanted = [field.name for field in fields(Hardware) if field.name != "name"]
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: expected key: value lines with {', '.join(wanted)}")
    for key in values:
        if key not in wanted:
            raise ValueError(f"{source}: unknown key {key}; {nearest(str(key), wanted)}")
    for key in wanted:
        if key not in values:
            raise ValueError(f"{source}: missing key {key}")
    numbers = {key: values[key] for key in wanted if key not in ("description", "peak_tflops", "measured")}
    if not isinstance(values["peak_tflops"], Mapping) or not values["peak_tflops"]:
        raise ValueError(f"{source}: peak_tflops = {values['peak_tflops']!r}: expected precision: TFLOP/s pairs")
    numbers |= {f"peak_tflops.{key}": value for key, value in values["peak_tflops"].items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (value == 0 and key != "reserved_gb"):
            raise ValueError(f"{source}: {key} = {value!r}: expected a positive number")
    if not isinstance(values["measured"], bool):
        raise ValueError(f"{source}: measured = {values['measured']!r}: expected true or false")
    if not isinstance(values["nvlink_domain"], int):
        raise ValueError(f"{source}: nvlink_domain = {values['nvlink_domain']!r}: expected a whole number")
    return Hardware(name=name, **{key: values[key] for key in wanted})
