"""A CUDA device without a GPU: what torch must believe before its "cuda" tensors can be fake.

torch's FakeTensors carry a shape, strides, a dtype and a device, and no numbers. On a CPU build of
torch, some code paths still ask for a CUDA runtime: `.to("cuda")`, autocast, the backward pass,
FSDP's streams, DDP's reducer. `pretend` answers them. It changes torch for the whole process, by
private interfaces, so it runs only on the torch version that it was written for (`unsupported`; it
was tested on the CPU build), and such a process should leave by `os._exit`.

infra/fake_gpu.py runs operations on such a device and measures them.
"""

import atexit
import contextlib
import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

VERSION = "2.13.0"  # of torch
CUDA = 1  # c10::DeviceType::CUDA
# places in the table of virtual functions of at::CUDAHooksInterface
IS_BUILT, HAS_PRIMARY_CONTEXT = 2, 4


def unsupported():
    """Why this process cannot pretend to have a GPU, or None if it can."""
    if torch.__version__.split("+")[0] != VERSION:
        return f"torch is {torch.__version__}, the simulation is written for {VERSION}"
    if sys.platform != "linux":
        return f"the platform is {sys.platform}, the simulation runs on linux"
    return None


def pretend(memory, gpus=1):
    """From here on torch believes in `gpus` GPUs of `memory` bytes each; this process has the
    first.

    Raises RuntimeError: see `unsupported`.
    """
    if reason := unsupported():
        raise RuntimeError(reason)
    _native_tables()
    _runtime(memory, gpus)


def _native_tables():
    """The two places where C++ code asks for CUDA: the device guard, and the hooks of the autograd
    engine."""
    library = Path(torch.__file__).parent / "lib"
    c10 = ctypes.CDLL(str(library / "libc10.so"))
    cpu = ctypes.CDLL(str(library / "libtorch_cpu.so"))
    guards = (ctypes.c_void_p * 20).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[CUDA]:
        # torch replaces a guard that knows of 0 devices by its own guard that does nothing
        zero = ctypes.CFUNCTYPE(ctypes.c_int)(_zero)
        functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
        guard = (ctypes.c_void_p * 1)(ctypes.addressof(functions))
        guards[CUDA] = ctypes.addressof(guard)
        torch._C._ensureCUDADeviceGuardSet()
        if guards[CUDA] == ctypes.addressof(guard):
            raise RuntimeError("torch kept the device guard that was to be replaced")
    get = cpu._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get())  # points to the table of virtual functions
    original = hooks.value
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(_true)
    table = (ctypes.c_void_p * 258)()
    # two entries, offset and type, stand before the first function
    table[:] = (ctypes.c_void_p * 258).from_address(original - 16)[:]
    for place in (IS_BUILT, HAS_PRIMARY_CONTEXT):
        table[2 + place] = ctypes.cast(yes, ctypes.c_void_p).value
    hooks.value = ctypes.addressof(table) + 16
    _native_tables.kept = yes, table  # C++ points to them
    atexit.register(setattr, hooks, "value", original)


def _zero():
    return 0


def _true(_):
    return True


# ---- torch.cuda


class Event:
    """Work on a fake GPU is done at once."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        return self

    def wait(self, *_):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class Stream:
    """All streams of a fake GPU are one."""

    def __init__(self, *_, **__):
        self.device = torch.device("cuda", 0)

    def wait_stream(self, _):
        pass

    def wait_event(self, _):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        pass

    def is_capturing(self):
        return False


def _runtime(memory, gpus):
    """torch.cuda and what else asks for the runtime in Python."""
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.cuda.amp.common

    stream = Stream()
    about = SimpleNamespace(
        name="fake GPU", total_memory=memory, major=9, minor=0, multi_processor_count=132
    )
    answers = dict(
        is_available=True,
        is_initialized=True,
        is_bf16_supported=True,
        device_count=gpus,
        current_device=0,
        current_stream=stream,
        get_device_properties=about,
        get_device_capability=(9, 0),
        stream=contextlib.nullcontext(),
        max_memory_allocated=0,
        **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache")),
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    torch.cuda.Stream, torch.cuda.Event, torch.Event = Stream, Event, Event
    torch.cuda.amp.common.amp_definitely_not_available = _always(False)  # for torch.autocast
    torch.accelerator.current_stream = _always(stream)
    torch._C._get_accelerator = _always(torch.device("cuda"))
    fake_tensor.FakeTensorMode.avoid_device_init = property(_true)
    fake_tensor.init_gpu_context = _always(None)


def _always(answer):
    def function(*_, **__):
        return answer

    return function


# ---- the other ranks


def fake_ranks(world, of_rank):
    """A process group of `world` ranks in this process, which is rank 0. Nothing is communicated.

    of_rank: (object of this rank, r) -> what rank r passes to all_gather_object in its place. A
    broadcast object that another rank sends is this rank's own. Tensors arrive as fake ones.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401  registers them
    import torch.nn.parallel.distributed as ddp
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    new_group = dist.new_group
    sent = []

    def fake_group(ranks=None, timeout=None, backend=None):
        return new_group(ranks, timeout, backend="fake")

    def all_gather_object(out, x, group=None):
        out[:] = [of_rank(x, r) for r in range(len(out))]

    def broadcast_object_list(box, group=None, group_src=0):
        if group_src == 0:
            sent[:] = box
        box[:] = sent

    dist.new_group = fake_group
    dist.all_gather_object = all_gather_object
    dist.broadcast_object_list = broadcast_object_list
    ddp._verify_param_shape_across_processes = _always(None)
    ddp._sync_module_states = _always(None)


def finish_ddp(wrapped):
    """What a DistributedDataParallel module needs on fake ranks: the fake all-reduce returns no
    future, and the logger asks a real process group."""

    def hook(_, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    wrapped.logger = SimpleNamespace(
        set_runtime_stats_and_log=_always(None), set_error_and_log=_always(None)
    )
