"""A second device that computes: what a GPU is to Python code, without one.

    with second_device() as device:
        model.to(device.device)

A tensor on it holds its numbers in a tensor of the processor, and every operation is computed there. It has the rules
of a GPU that code on a processor can break without noticing:

- Operands are on one device. Only a number without axes may come from the processor, and the indices of `x[i]`.
- `.numpy()` and `numpy.asarray` raise TypeError: numbers come back with `.cpu()`.
- A generator of the processor does not draw on it.
- Bytes count: `mem_get_info`, `memory_allocated` and `memory_reserved` tell of the tensors that are alive.

It does not show what a real device rounds, how fast it is, which kernels it lacks, or what needs a stream.

The device is torch's `privateuseone` under the name `second`, which exists in a process from the first use on, but is
available only inside the context. It needs a torch in which Python alone can be a backend.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NAME = "second"
TOTAL_BYTES = 24 * 10**9
MISSING = (
    None if hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
    else f"torch {torch.__version__} has no backends in Python"
)  # fmt: skip
"""Why there is no second device here, if there is none."""

_MOVING = frozenset({"aten::_to_copy", "aten::copy_", "aten::copy", "aten::_foreach_copy_"})
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
_STRICT = frozenset({"aten::cat", "aten::stack"})
"""Operations that do not take a number of the processor either."""


class SecondDevice(TorchDispatchMode):
    """Runs operations on the device, checks where operands are, and counts bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.operations = 0
        self.most_bytes = 0
        """Most bytes since the start, or since this was set."""
        self._sizes: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that are alive; views share theirs."""
        return sum(self._sizes.values())

    def hold(self, tensor: DeviceTensor) -> None:
        """Count a tensor's storage until the last tensor that uses it is gone."""
        storage = tensor.inner.untyped_storage()
        place = storage.data_ptr()
        with self._lock:
            self._sizes[place] = storage.nbytes()
            self._users[place] = self._users.get(place, 0) + 1
            self.most_bytes = max(self.most_bytes, self.bytes)
        weakref.finalize(tensor, self._release, place).atexit = False

    def _release(self, place: int) -> None:
        with self._lock:
            self._users[place] -= 1
            if not self._users[place]:
                del self._users[place], self._sizes[place]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = _leaves(args, kwargs)
        operands = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        if not operands and not any(device.type == NAME for device in asked):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # what autograd would have split into its parts comes whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        name = func._schema.name
        if name not in _MOVING:
            _check_operands(name, args, leaves)
        self.operations += 1
        out = func(*map(_inside, args), **{key: _inside(value) for key, value in kwargs.items()})
        here = asked[-1].type == NAME if asked else bool(operands)
        same = {id(tensor.inner): tensor for tensor in operands}
        return tree_map(lambda found: self._outside(found, same) if here or id(found) in same else found, out)

    def _outside(self, found: Any, same: dict[int, DeviceTensor]) -> Any:
        """Return a result as a tensor of the device; an operand that was changed in place is returned itself."""
        if not isinstance(found, torch.Tensor):
            return found
        if id(found) not in same:
            return DeviceTensor(found, self)
        operand = same[id(found)]
        assert operand.shape == found.shape, "an operation in place changed the shape"
        return operand


class DeviceTensor(torch.Tensor):
    """A tensor on the second device."""

    inner: torch.Tensor
    home: SecondDevice

    @staticmethod
    def __new__(
        cls, inner: torch.Tensor, home: SecondDevice | None = None, *, requires_grad: bool = False
    ) -> DeviceTensor:
        if home is None:  # accelerate makes a parameter by the class of the one that was there, see its `cpu_offload`
            made: Any = torch.nn.Parameter(inner, requires_grad=requires_grad)
            return made
        with torch.inference_mode(False):  # views of other tensors would be refused
            self: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=home.device,
            )  # fmt: skip
        self.inner, self.home = inner, home
        home.hold(self)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operand = next(leaf for leaf in _leaves(args, kwargs or {}) if isinstance(leaf, cls))
        return operand.home.__torch_dispatch__(func, types, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = DeviceTensor(self.inner.clone(), self.home).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied.detach(), requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"DeviceTensor({self.inner})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.inner.tolist()


def _leaves(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments of an operation, and those in lists: there are no deeper ones."""
    found = []
    for value in (*args, *kwargs.values()):
        found.extend(value) if isinstance(value, (list, tuple)) else found.append(value)
    return found


def _inside(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, (list, tuple)):
        return type(value)(map(_inside, value))
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _check_operands(name: str, args: Any, leaves: list[Any]) -> None:
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{name}: expected a generator of the device, found one of cpu")
    if name in _INDEXING and isinstance(args[0], DeviceTensor):
        leaves = [args[0], *args[2:]]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    placed = [tensor for tensor in tensors if name in _STRICT or tensor.dim() or isinstance(tensor, DeviceTensor)]
    if len(found := {str(tensor.device) for tensor in placed}) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {', '.join(sorted(found))}")


@functools.cache
def _registered() -> types.ModuleType:
    """Make torch know the device, and return the module `torch.second`."""
    module = types.ModuleType(NAME)
    module.is_available = lambda: False  # type: ignore[attr-defined]
    module.is_initialized = module._is_in_bad_fork = module.is_available  # type: ignore[attr-defined]
    module.device_count = lambda: int(module.is_available())  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
    module.manual_seed_all = module.empty_cache = module.synchronize = lambda *_: None  # type: ignore[attr-defined]

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return bool(module.is_available())  # type: ignore[attr-defined]

    backend_registration._setup_privateuseone_for_python_backend(NAME, module, Hook())
    return module


@contextlib.contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Have a second device inside the context."""
    module: Any = _registered()
    home = SecondDevice()
    before, lifts = dict(vars(module)), torch._C._only_lift_cpu_tensors()
    module.is_available = lambda: True
    module.memory_allocated = module.memory_reserved = lambda device=None: home.bytes
    module.max_memory_reserved = lambda device=None: home.most_bytes
    module.reset_peak_memory_stats = lambda device=None: setattr(home, "most_bytes", home.bytes)
    module.mem_get_info = lambda device=None: (TOTAL_BYTES - home.bytes, TOTAL_BYTES)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…): made on the processor, then moved
    try:
        # An error in a hook of the backward pass would end the process if the pass ran in threads.
        with home, torch.autograd.set_multithreading_enabled(False):
            yield home
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        vars(module).clear()
        vars(module).update(before)
