"""An NVIDIA GPU, through NVML. Tested with a driver of the tests, and not on a GPU yet."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import psutil

from swarmkit.worker.sensing.probes import UnknownError
from swarmkit.worker.signals import GpuSignals


@dataclass(frozen=True)
class Gpu:
    """What a GPU is. Memory in bytes."""

    device: str
    name: str
    memory: int


def gpus() -> tuple[Gpu, ...]:
    """Return all GPUs of this computer.

    Raises:
        UnknownError: there is no NVML, or it does not tell.
    """
    nvml = _begun()
    try:
        found = []
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle).total
            found.append(Gpu(f"cuda:{number}", str(name), int(memory)))
        return tuple(found)
    except nvml.NVMLError as error:
        raise UnknownError(f"the driver does not tell about its GPUs: {error}") from error
    finally:
        nvml.nvmlShutdown()  # which counts how often it was begun


def _begun() -> Any:
    """NVML, ready to be asked. Raises: UnknownError."""
    try:
        import pynvml
    except ImportError:
        raise UnknownError("install the extra `worker` to see what the GPU does") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise UnknownError(f"NVIDIA's driver does not answer: {error}") from error
    return pynvml


class NvidiaGpu:
    """One GPU.

    NVML numbers GPUs as PyTorch does where CUDA_DEVICE_ORDER is PCI_BUS_ID or all GPUs are alike.
    """

    def __init__(self, device: str) -> None:
        """Args: device: `cuda` or `cuda:N`.

        Raises:
            UnknownError: there is no NVML, or no such GPU.
        """
        self.device = device
        self._nvml = nvml = _begun()
        number = device.partition(":")[2]
        try:
            self._gpu = nvml.nvmlDeviceGetHandleByIndex(int(number) if number else 0)
        except nvml.NVMLError as error:
            raise UnknownError(f"the driver does not tell about {device}: {error}") from error

    def signals(self, own: Collection[int]) -> GpuSignals:
        """What others do on it, and how hot it is. Args: own: processes that are ours."""
        programs = self._programs(own)
        load = self._load()
        own_load = self._load_of(own)
        return GpuSignals(
            other_programs=programs,
            other_load=None if load is None or own_load is None else max(0.0, load - own_load),
            temperature_c=self._asked("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
            watts=_scaled(self._asked("nvmlDeviceGetPowerUsage"), 1e-3),
        )

    def set_watts(self, watts: float | None) -> bool:
        """Set the power limit, or put back the usual one; returns whether the system allowed that."""
        nvml = self._nvml
        try:
            usual = nvml.nvmlDeviceGetPowerManagementDefaultLimit(self._gpu)
            low, high = nvml.nvmlDeviceGetPowerManagementLimitConstraints(self._gpu)
            milliwatts = usual if watts is None else min(max(int(watts * 1e3), low), high)
            nvml.nvmlDeviceSetPowerManagementLimit(self._gpu, milliwatts)
        except nvml.NVMLError:  # administrators only, mostly
            return False
        return True

    def _programs(self, own: Collection[int]) -> tuple[str, ...] | None:
        """Programs of others that compute on it. A desktop's own drawing does not count."""
        clients = self._asked("nvmlDeviceGetComputeRunningProcesses")
        if clients is None:
            return None
        names = []
        for client in clients:
            if client.pid in own:
                continue
            with contextlib.suppress(psutil.Error):
                names.append(psutil.Process(client.pid).name())
        return tuple(names)

    def _load(self) -> float | None:
        rates = self._asked("nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu / 100

    def _load_of(self, own: Collection[int]) -> float | None:
        """The load of our own processes; None where the driver does not tell."""
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._gpu, 0)
        except self._nvml.NVMLError_NotFound:
            return 0.0  # nobody has used it since then
        except self._nvml.NVMLError:
            return None
        return sum(sample.smUtil for sample in samples if sample.pid in own) / 100

    def _asked(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._gpu, *arguments)
        except self._nvml.NVMLError:
            return None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
