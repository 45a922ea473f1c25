"""An OpenVINO core with devices that this machine lacks, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino

from edgeprune.runtimes import openvino as runtime

EXACT = runtime.settings_of("CPU", threads=1)
CORE = runtime.core


class FakeCore:
    """Sees two GPUs and an NPU; compiles for the CPU, and writes down what for."""

    available_devices = ("CPU", "GPU.0", "GPU.1", "NPU")
    compiled: list[tuple[str, bool, dict[str, Any]]] = []

    def read_model(self, path: Path) -> Any:
        return CORE().read_model(path)

    def compile_model(self, model: Any, device: str, config: dict[str, Any]) -> Any:
        static = isinstance(model, openvino.Model) and not model.is_dynamic()
        self.compiled.append((device, static, config))
        return CORE().compile_model(model, "CPU", EXACT)
