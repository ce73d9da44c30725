"""Runs GPU code without a GPU and without numbers, and measures it: memory, syncs, operations.

    fake_cuda.pretend(memory=80e9)
    with FakeGPU() as gpu:
        with gpu.phase("forward"):
            y = model(x)                  # on "cuda": shapes, dtypes, devices, strides, storages
    gpu.phases["forward"].peak            # bytes, and .sites: who held them

CPU tensors are real. An operation that touches "cuda" runs on FakeTensors, which raise for tensors
of different devices or dtypes as a GPU does (with SAME_DTYPE and `check_flash` for what they let
pass). What depends on numbers:

    integers and bools   are computed on the CPU beside the fake operation, so that shapes that
                         depend on them (nonzero, masks, tolist) come out right
    floats               have no numbers. Copied from the device they are 0 (read as Python numbers:
                         0.5), and integers computed from them are 0

What is measured, for each phase (`Phase`):

    memory       of all storages on the device, each rounded up to 512 bytes as by torch's
                 allocator, and the known temporaries of kernels (`workspace`)
    syncs        where the host waits for the device: numbers that are read, shapes that depend on
                 them, and copies from or to pageable memory
    kernels      operations that are not views (an operation may launch several kernels)
    roofline     the larger of FLOPs / rate and bytes / bandwidth of each operation, at the assumed
                 EFFICIENCY. A model, not a measurement

What it cannot know: numbers, NCCL, fragmentation, most kernels' temporaries, launch times.
"""

import contextlib
import math
import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default

# FLOP/s in half precision and in fp32 (without TF32), bytes/s; of the data sheets (SXM, 80 GB)
GPUS = {
    "A100": dict(half=312e12, single=19.5e12, bandwidth=2.04e12),
    "H100": dict(half=989e12, single=67e12, bandwidth=3.35e12),
}
EFFICIENCY = dict(matmul=0.6, flash=0.45, bandwidth=0.8)  # assumed shares of these rates
LARGEST_VALUE = 2**23  # integers of a tensor whose numbers are computed; more are taken as 0

VIEWS = set(
    """view _unsafe_view t transpose permute expand select slice unsqueeze squeeze detach alias
    as_strided split split_with_sizes unbind unfold diagonal lift_fresh _reshape_alias unflatten
    empty empty_like new_empty empty_strided new_empty_strided is_same_size set_ resize_ sym_size
    record_stream""".split()
)
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
VALUE_DEPENDENT = "nonzero masked_select unique_dim _unique2 unique_consecutive bincount".split()
# operations whose fake form does not check dtypes: the arguments that must have one
SAME_DTYPE = {
    "mm": (0, 1),
    "addmm": (0, 1, 2),
    "index_add_": (0, 3),
    "index_copy_": (0, 3),
    "index_put_": (0, 2),
    "_index_put_impl_": (0, 2),
}
NEVER_NAMED = ("/site-packages/torch/", "/contextlib.py", "/threading.py", "<")  # as sites
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


@dataclass
class Phase:
    """What happened between the begin and the end of a phase, in all its visits together."""

    peak: int = 0  # bytes
    sites: Counter = field(default_factory=Counter)  # "file:line [operation]" -> bytes at the peak
    syncs: Counter = field(default_factory=Counter)  # (kind, "file:line") -> number
    kernels: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0  # read and written
    communicated: float = 0.0  # bytes handed to collective operations
    seconds: Counter = field(default_factory=Counter)  # GPU -> roofline


class FakeGPU(TorchDispatchMode):
    """A context in which "cuda" tensors are fake and measured. `fake_cuda.pretend` comes first.

    root: the folder whose lines are named as sites.  hidden: files in it that are named only where
    there is no other.
    phases: {name: Phase}.  now: bytes in use.
    """

    def __init__(self, root, hidden=()):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.root, self.hidden = f"{root}/", {*map(str, hidden)}
        self.kinds = {}  # of files, by kind_of
        self.phases, self.name, self.times = {}, "", 1.0
        self.now, self.live, self.refs = 0, {}, {}  # storage's id -> (bytes, site); -> weak ref
        self.by_site, self.grown = Counter(), False  # grown: a peak without its sites yet
        self.enter_phase("")

    def __enter__(self):
        # a tensor made from a list is made on the CPU and copied, as on a GPU
        self.lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self.resize, self.tolist = torch.UntypedStorage.resize_, FakeTensor.tolist
        self.sdpa = F.scaled_dot_product_attention
        resize, gpu = self.resize, self

        def resize_(storage, size):  # FSDP frees and refills storages
            resize(storage, size)
            gpu.resized(storage, size)

        def tolist(x):  # one copy, as on a GPU
            gpu.sync("tolist")
            numbers = gpu.value(x)
            if numbers.dtype.is_floating_point:
                numbers = torch.full_like(numbers, 0.5)
            return numbers.tolist()

        torch.UntypedStorage.resize_, FakeTensor.tolist = resize_, tolist
        F.scaled_dot_product_attention = self.attention
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.lift)
        torch.UntypedStorage.resize_, FakeTensor.tolist = self.resize, self.tolist
        F.scaled_dot_product_attention = self.sdpa
        return super().__exit__(*error)

    # ---- phases

    @contextlib.contextmanager
    def phase(self, name):
        """Inside, everything counts for this phase."""
        before = self.name
        self.enter_phase(name)
        self.mark()
        try:
            yield
        finally:
            self.enter_phase(before)

    def enter_phase(self, name):
        """Counts for this phase from here on."""
        self.keep_sites()
        self.name, self.current = name, self.phases.setdefault(name, Phase())

    @contextlib.contextmanager
    def repeated(self, times):
        """Inside, every operation and sync counts so often."""
        self.times = times
        try:
            yield
        finally:
            self.times = 1.0

    def reset(self, name):
        """Forgets all phases, and enters one; what is in use stays."""
        self.phases = {}
        self.enter_phase(name)
        self.mark()

    # ---- memory

    def track(self, x, name):
        """Counts the storage of a fake tensor until it is freed. name: of the operation."""
        storage = x.untyped_storage()
        key = id(storage)
        if key in self.live:
            return
        site = f"{self.site()} [{name}]"

        def freed(_):
            self.resize_live(key, 0)
            self.live.pop(key)
            self.refs.pop(key)

        self.live[key] = (0, site)
        self.refs[key] = weakref.ref(storage, freed)
        self.resize_live(key, storage.nbytes())

    def resized(self, storage, size):
        if id(storage) in self.live:
            self.resize_live(id(storage), size)

    def resize_live(self, key, size):
        before, site = self.live[key]
        size = -(-size // 512) * 512
        if size < before:
            self.keep_sites()
        self.live[key] = (size, site)
        self.by_site[site] += size - before
        self.now += size - before
        self.mark()

    def mark(self):
        """Notes a new peak; `keep_sites` notes its sites before memory shrinks."""
        if self.now > self.current.peak:
            self.current.peak, self.grown = self.now, True

    def keep_sites(self):
        if self.grown:
            self.current.sites, self.grown = Counter(self.by_site), False

    def temporary(self, size, site):
        """Memory that a kernel takes and gives back."""
        if self.now + size > self.current.peak:
            self.current.peak, self.grown = self.now + size, False
            self.current.sites = self.by_site + Counter({f"{site} workspace": size})

    # ---- where

    def site(self):
        """The innermost line of the project that is running, "file:line"; and the innermost of a
        library below it, but for torch. The autograd engine has no line of the project."""
        frame, library, around = sys._getframe(1), "", ""
        while frame is not None:
            file = frame.f_code.co_filename
            if file not in self.kinds:
                self.kinds[file] = self.kind_of(file)
            kind = self.kinds[file]
            if kind:
                line = f"{file.rpartition('/')[2]}:{frame.f_lineno}"
            if kind == "project":
                return line + library
            if kind == "library":
                library = library or f" <- {line}"
            if kind == "hidden":
                around = around or line
            frame = frame.f_back
        return (around or "backward") + library

    def kind_of(self, file):
        """project, hidden or library; "" for a file whose lines are never named."""
        if file in self.hidden:
            return "hidden"
        if file == __file__ or any(x in file for x in NEVER_NAMED):
            return ""
        installed = not file.startswith(self.root) or "/site-packages/" in file
        return "library" if installed else "project"

    def sync(self, kind):
        self.current.syncs[kind, self.site()] += self.times

    # ---- numbers

    def value(self, x):
        """The numbers of a tensor, on the CPU; 0 for those that are not known.

        Those of a view share memory with those of its base.
        """
        if not isinstance(x, FakeTensor):
            return x
        known = getattr(x, "_value", None)
        return torch.zeros(x.shape, dtype=x.dtype) if known is None else known

    def on_device(self, value):
        """A fake tensor with these numbers."""
        with self.fake:
            x = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
        x._value = value
        self.track(x, "index")
        return x

    def keep_values(self, func, flat, spec, outs):
        """Computes the numbers of the integers that an operation made, from those of its inputs."""
        wanted = [x for x in outs if has_value(x)]
        if not wanted or func.namespace != "aten":
            return
        inputs = [x for x in flat if isinstance(x, FakeTensor)]
        in_place = func._schema.is_mutable
        if not all(hasattr(x, "_value") for x in inputs):
            for x in wanted:
                if not in_place and not hasattr(x, "_value"):
                    x._value = torch.zeros(x.shape, dtype=x.dtype)
            return
        cpu = torch.device("cpu")
        values = [x._value if isinstance(x, FakeTensor) else x for x in flat]
        values = [cpu if isinstance(x, torch.device) else x for x in values]
        args, kwargs = tree_unflatten(values, spec)
        results = func(*args, **kwargs)
        for x, result in zip(outs, tensors_of(results)):
            if has_value(x) and not (in_place and x is inputs[0]):
                x._value = result

    # ---- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        fake = torch._C._TorchDispatchModeKey.FAKE
        if torch._C._get_dispatch_mode(fake) is not None:  # DTensor tries shapes by itself
            return func(*args, **kwargs)
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        flat, _ = tree_flatten((args, kwargs))
        fakes = [x for x in flat if isinstance(x, FakeTensor)]
        to = kwargs.get("device")
        to = None if to is None else torch.device(to).type
        foreign = fakes and fakes[0].fake_mode is not self.fake
        if foreign or not (fakes or to == "cuda"):
            return func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if func in READS:
            return self.read(func, args[0])
        if name in VALUE_DEPENDENT:
            return self.run_on_values(func, name, args, kwargs)
        if func is aten._to_copy.default and to == "cpu":
            self.sync("download")
            dtype = kwargs.get("dtype") or args[0].dtype
            return self.value(args[0]).to(dtype).clone()
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.sync("download")
            return func(args[0], self.value(args[1]))
        if name in INDEXING[1:] and (filled := self.as_masked_fill(args)):
            func, name, args = aten.masked_fill_.Scalar, "masked_fill_", filled
        args, kwargs = self.wait(func, name, args, kwargs, to)
        return self.run(func, name, args, kwargs)

    def read(self, func, x):
        """A number that the host waits for."""
        self.sync("item")
        if func is aten.equal.default:
            return True
        number = self.value(x).flatten()[0].item()
        return number or 0.5 if x.dtype.is_floating_point else number

    def run_on_values(self, func, name, args, kwargs):
        """An operation whose shape depends on numbers: the host waits for them."""
        self.sync(name)
        self.current.kernels += self.times
        found = func(*map(self.value, args), **kwargs)
        if isinstance(found, tuple):
            return tuple(map(self.on_device, found))
        return self.on_device(found)

    def wait(self, func, name, args, kwargs, to):
        """Counts the syncs of an operation -> its args and kwargs, masks as indices."""
        upload = func is aten._to_copy.default and to == "cuda"
        upload = upload and not isinstance(args[0], FakeTensor)
        if func is aten.copy_.default:
            upload = not isinstance(args[1], FakeTensor)
        if upload and not kwargs.get("non_blocking"):
            self.sync("upload")
        if name in INDEXING:
            args = (args[0], self.indices(args[1]), *args[2:])
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.sync(name)
            kwargs = {**kwargs, "output_size": int(self.value(args[0]).sum())}
        return args, kwargs

    def as_masked_fill(self, args):
        """x[mask] = number runs as masked_fill_ on a GPU, without a sync -> its args, or None."""
        x, indices, number = args[:3]
        if len(indices) != 1 or number.numel() != 1 or isinstance(number, FakeTensor):
            return None
        (mask,) = indices
        if mask.dtype != torch.bool:
            return None
        shape = [*mask.shape, *[1] * (x.ndim - mask.ndim)]
        return x, self.run(aten.view.default, "view", (mask, shape), {}), number.item()

    def indices(self, given):
        """The indices of x[...], with masks as the positions where they are true."""
        out = []
        for index in given:
            if not isinstance(index, torch.Tensor):
                out.append(index)
            elif index.dtype in (torch.bool, torch.uint8):
                self.sync("mask")
                out += [self.on_device(x.contiguous()) for x in self.value(index).nonzero().T]
            else:
                if not isinstance(index, FakeTensor):
                    self.sync("CPU index")
                out.append(index)
        return out

    def run(self, func, name, args, kwargs):
        """Runs an operation on fake tensors, and counts it."""
        if func in (FLASH, FLASH_BACKWARD):
            check_flash(func, args)
        dtypes = {args[i].dtype for i in SAME_DTYPE.get(name, ())}
        if len(dtypes) > 1:
            raise RuntimeError(f"{name} on a GPU: {dtypes}, expected the same dtype")
        flat, spec = tree_flatten((args, kwargs))
        with self.fake:
            out = func(*args, **kwargs)
        outs = tensors_of(out)
        for x in outs:
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                self.track(x, name)
        if size := workspace(func, name, args, outs):
            self.temporary(size, f"{self.site()} [{name}]")
        self.keep_values(func, flat, spec, outs)
        if name not in VIEWS:
            self.count(func, name, args, kwargs, out, flat, outs)
        return out

    # ---- cost

    def count(self, func, name, args, kwargs, out, flat, outs):
        """Adds an operation to the phase: kernels, FLOPs, bytes, seconds."""
        inputs = [x for x in flat if isinstance(x, FakeTensor)]
        phase, times = self.current, self.times
        if func.namespace in ("c10d", "_c10d_functional"):
            phase.communicated += times * max(map(size_of, inputs + outs), default=0)
            return
        moved = traffic(name, inputs, outs)
        flops = flops_of(func, name, args, kwargs, out)
        phase.kernels += times
        phase.flops += times * flops
        phase.bytes += times * moved
        dtype = (outs or inputs)[0].dtype if outs or inputs else torch.float32
        rate = "half" if dtype in (torch.bfloat16, torch.float16) else "single"
        efficiency = EFFICIENCY["flash" if func in (FLASH, FLASH_BACKWARD) else "matmul"]
        for gpu, limits in GPUS.items():
            compute = flops / (limits[rate] * efficiency)
            memory = moved / (limits["bandwidth"] * EFFICIENCY["bandwidth"])
            phase.seconds[gpu] += times * max(compute, memory)

    def attention(
        self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """F.scaled_dot_product_attention, by the flash kernel on the fake GPU."""
        if q.device.type != "cuda":
            how = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
            return self.sdpa(q, k, v, **how, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None:
            raise NotImplementedError("attention with a mask is not simulated")
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        flash = aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]


def tensors_of(out):
    """All tensors in what an operation returned."""
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]


def has_value(x):
    """Whether the numbers of a tensor are computed: small tensors of integers, not bytes of
    pixels."""
    if not isinstance(x, FakeTensor) or x.dtype.is_floating_point or x.dtype.is_complex:
        return False
    return x.dtype != torch.uint8 and x.numel() <= LARGEST_VALUE


def size_of(x):
    """Bytes of a tensor; an expanded dimension is read once."""
    return x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride()) if step)


def traffic(name, inputs, outs):
    """Bytes that an operation reads and writes."""
    written = sum(map(size_of, outs))
    if name in ("index", "index_select", "embedding", "gather"):
        return 2 * written
    if name in ("index_put_", "index_copy_", "index_add_", "_index_put_impl_", "index_put"):
        return 3 * sum(map(size_of, inputs[1:]))
    if name in ("zeros", "zero_", "fill_", "zeros_like", "new_zeros", "full", "ones"):
        return written
    return sum(map(size_of, inputs)) + written


def flops_of(func, name, args, kwargs, out):
    """Floating-point operations of matrix products and attention; 0 for all others."""
    if func is FLASH:
        q, k = args[:2]
        causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
        return pair_flops(q, k, causal)
    if func is FLASH_BACKWARD:
        return 2.5 * pair_flops(args[1], args[2], args[11])
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count and func.namespace == "aten" else 0


def pair_flops(q, k, causal):
    """Of attention's two matrix products: q (n, H, a, d), k (n, Hkv, b, d)."""
    n, H, a, d = q.shape
    return 4 * n * H * a * k.shape[2] * d * (0.5 if causal else 1.0)


def workspace(func, name, args, outs):
    """Bytes that a kernel takes for itself, where its source is known.

    flash backward: the gradient of q in fp32 and a number per query, both rounded up; and, with
    grouped heads, the gradients of k and v of every query head. index_put_(accumulate=True): sorts
    64-bit keys. sort: a copy.
    """
    if func is FLASH_BACKWARD:
        q, k = args[1:3]
        n, H, a, d = q.shape
        queries, width = -(-a // 128) * 128, -(-d // 32) * 32
        size = 4 * n * H * queries * (width + 1)
        if H != k.shape[1]:
            size += 2 * 2 * n * H * k.shape[2] * d
        return size
    if name in INDEXING and len(args) > 3 and args[3]:
        return 4 * 8 * max(x.numel() for x in args[1] if x is not None)
    return 2 * sum(map(size_of, outs)) if name == "sort" else 0


def check_flash(func, args):
    """Raises RuntimeError for tensors that the CUDA flash kernels refuse or would read wrongly."""
    q, k, v = args[:3] if func is FLASH else args[1:4]
    n, H, a, d = q.shape
    causal = args[11] if func is FLASH_BACKWARD else len(args) > 4 and args[4]
    half = (torch.bfloat16, torch.float16)
    refuse("dtype", q.dtype in half, f"{q.dtype}, expected bf16 or fp16")
    dtypes = {x.dtype for x in (q, k, v)}
    refuse("dtypes", len(dtypes) == 1, f"{dtypes} of q, k and v, expected one")
    refuse("head dim", d % 8 == 0 and d <= 256, f"{d}, expected a multiple of 8 up to 256")
    refuse("heads", H % k.shape[1] == 0, f"{H} of queries, {k.shape[1]} of keys")
    refuse("batch", n <= 65535, f"{n}, expected at most 65535")  # a dimension of the launch
    refuse("causal", not causal or a == k.shape[2], f"{a} queries, {k.shape[2]} keys")
    refuse("keys", k.shape == v.shape, f"{tuple(k.shape)}, values {tuple(v.shape)}")
    inner = [x.stride(-1) for x in (q, k, v)]
    refuse("strides", inner == [1, 1, 1], f"{inner} of the last dimension, expected 1")
    if func is FLASH_BACKWARD:
        grad, out, lse = args[0], args[4], args[5]
        refuse("gradient", grad.dtype == out.dtype == q.dtype, f"{grad.dtype}, out {out.dtype}")
        inner = [grad.stride(-1), out.stride(-1)]
        refuse("strides", inner == [1, 1], f"{inner} of gradient and output, expected 1")
        expected = tuple(lse.shape) == (n, H, a) and lse.dtype == torch.float32
        shape = f"{tuple(lse.shape)} {lse.dtype}, expected {(n, H, a)} fp32, contiguous"
        refuse("log-sum-exp", expected and lse.is_contiguous(), shape)


def refuse(what, holds, found):
    """Raises RuntimeError unless it holds."""
    if not holds:
        raise RuntimeError(f"flash attention on a GPU: {what}: {found}")
