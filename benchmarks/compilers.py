"""Compile programs with XLA's GPU and TPU compilers on a machine without these devices.

The compilers are Python packages (`make accelerators` installs them). They compile for a device
that is described by a text, and the compiled program lists the kernels, the bytes that each kernel
reads and writes, the temporary memory and, for a TPU, the number of cycles that the compiler
estimates. Nothing runs. The bytes divided by the bandwidth of the memory are a lower bound of the
time.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# ---------------------------------------------------------------- devices


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that a compiler can compile for.

    Attributes:
      name: the name in tables.
      platform: `"cuda"`, `"rocm"` or `"tpu"`.
      bandwidth: bytes per second of the device memory.
      topology: the compiler's name of the device.
      target: a `GpuTargetConfigProto` as text, for a GPU.
    """

    name: str
    platform: str
    bandwidth: float
    topology: str
    target: str | None = None

    @functools.cached_property
    def devices(self) -> Any:
        """The devices of the topology. Raises `Unavailable` without the compiler."""
        _register(self.platform)
        options = {}
        if self.target is not None:
            options = {"target_config": self.target, "topology": "1x1x1"}
        try:
            return topologies.get_topology_desc(self.topology, self.platform, **options).devices
        except Exception as error:  # each plugin raises its own exception type
            raise Unavailable(f"{self.name}: {first_line(error)}") from error


class Unavailable(Exception):
    """A compiler is not installed, does not know a device or fails to compile a program."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an exception, or the name of its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _gpu(
    name: str,
    *,
    capability: str,
    cores: int,
    fpus: int,
    shared: int,
    optin: int,
    bandwidth: float,
    cache: int,
    clock: float,
    memory: int,
    registers: int = 65536,
    warp: int = 32,
    platform: str = "cuda",
) -> Device:
    """Return a GPU described by the properties that XLA's compiler reads."""
    target = f"""
      gpu_device_info {{
        threads_per_block_limit: 1024
        threads_per_warp: {warp}
        threads_per_core_limit: 2048
        shared_memory_per_block: {min(optin, 49152) if platform == "cuda" else optin}
        shared_memory_per_block_optin: {optin}
        shared_memory_per_core: {shared}
        core_count: {cores}
        fpus_per_core: {fpus}
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
        thread_dim_limit_x: 1024
        thread_dim_limit_y: 1024
        thread_dim_limit_z: 64
        memory_bandwidth: {bandwidth:.0f}
        l2_cache_size: {cache}
        clock_rate_ghz: {clock}
        device_memory_size: {memory}
        registers_per_core_limit: {registers}
        registers_per_block_limit: {registers}
        {capability}
      }}
      platform_name: "{platform.upper()}"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      device_description_str: "{name}"
    """
    return Device(name, platform, bandwidth, name, target)


def _cuda(major: int) -> str:
    accelerated = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"cuda_compute_capability {{ major: {major} feature_extension: {accelerated} }}"


# Sources: openxla/xla, xla/backends/gpu/target_config/specs (GPUs); the documentation of Google
# Cloud (bandwidths of TPUs).
DEVICES = {
    device.name: device
    for device in (
        _gpu(
            "A100",
            capability=_cuda(8),
            cores=108,
            fpus=64,
            shared=167_936,
            optin=166_912,
            bandwidth=2.03904e12,
            cache=41_943_040,
            clock=1.41,
            memory=85_100_068_864,
        ),
        _gpu(
            "H100",
            capability=_cuda(9),
            cores=132,
            fpus=128,
            shared=233_472,
            optin=232_448,
            bandwidth=3.35232e12,
            cache=52_428_800,
            clock=1.98,
            memory=84_942_979_072,
        ),
        _gpu(
            "H200",
            capability=_cuda(9),
            cores=132,
            fpus=128,
            shared=233_472,
            optin=232_448,
            bandwidth=4.8e12,
            cache=52_428_800,
            clock=1.98,
            memory=151_397_597_184,
        ),
        _gpu(
            "B200",
            capability=_cuda(10),
            cores=148,
            fpus=128,
            shared=233_472,
            optin=232_448,
            bandwidth=7.67232e12,
            cache=132_644_864,
            clock=1.965,
            memory=191_514_411_008,
        ),
        _gpu(
            "MI300",
            capability='rocm_compute_capability { gcn_arch_name: "gfx942:sramecc+:xnack-" }',
            cores=304,
            fpus=128,
            shared=65_536,
            optin=65_536,
            bandwidth=6.81e12,
            cache=4_194_304,
            clock=2.1,
            memory=270_566_162_432,
            registers=131_072,
            warp=64,
            platform="rocm",
        ),
        Device("v5e", "tpu", 819e9, "v5e:2x2x1"),
        Device("v5p", "tpu", 2765e9, "v5p:2x2x1"),
        Device("v6e", "tpu", 1640e9, "v6e:2x2x1"),
    )
}

# The module of the compiler of each platform.
PACKAGES = {
    "cuda": "jax_plugins.xla_cuda13",
    "rocm": "jax_plugins.xla_rocm7",
    "tpu": "libtpu",
}


def installed() -> bool:
    """Return whether the compiler of any platform is installed."""
    return any(_is_installed(package) for package in PACKAGES.values())


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def prepare() -> None:
    """Set the environment variables and flags of the compilers. Call this before JAX starts.

    Without them the TPU library queries the machine for a TPU, and the CUDA compiler tunes
    kernels on a GPU, which does not exist.
    """
    for name, value in {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the check loads CUDA's libraries
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # safe, because the library opens no device
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    flags = "--xla_gpu_autotune_level=0"
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        for library in Path(folder).glob("**/nvvm/libdevice/libdevice.*.bc"):
            flags += f" --xla_gpu_cuda_data_dir={library.parents[2]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def _register(platform: str) -> None:
    """Register the compiler of a platform with JAX. Raises `Unavailable` if it is missing."""
    package = PACKAGES[platform]
    if not _is_installed(package):
        raise Unavailable(f"{platform}: the package {package} is not installed")
    jax.devices()  # the first call discovers and registers the plugins


def device(name: str) -> Device:
    """Return a device by name. Raises `Unavailable` if nothing can be compiled for it."""
    if name not in DEVICES:
        raise Unavailable(f"{name}: got no device of that name, wanted one of {tuple(DEVICES)}")
    found = DEVICES[name]
    found.devices  # noqa: B018  raises `Unavailable`
    return found


def compile_for(device: Device, function: Callable, *args: Any) -> jax.stages.Compiled:
    """Compile a function for one device. `args` are arrays, or their shapes and dtypes."""
    single = SingleDeviceSharding(device.devices[0])
    try:
        return jax.jit(function, in_shardings=single, out_shardings=single).lower(*args).compile()
    except Exception as error:
        raise Unavailable(f"{device.name}: {first_line(error)}") from error


# ---------------------------------------------------------------- HLO


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of an HLO module."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def scope(self) -> str:
        """The JAX name scope of the instruction; empty if there is none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """Return the computation that an attribute names, such as the `body` of a loop."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found and found[1]


Computation = dict[str, Operation]

_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\](\{[^}]*\})?")
_ITEM_SIZES = {"pred": 1, "c64": 8, "c128": 16}


def _closing_parenthesis(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text!r}")


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a module by name, and the name of its entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        if line and not line[0].isspace() and (start := _COMPUTATION.match(line)):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, rest = found.groups()
            end = _closing_parenthesis(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
            type_, rest = rest[:end], rest[end:].lstrip()
            opened = rest.index("(")
            closed = _closing_parenthesis(rest, opened)
            operands = re.findall(r"%([\w.-]+)", rest[opened:closed])
            current[name] = Operation(
                name, type_, rest[:opened], tuple(operands), rest[opened:], bool(root)
            )
    return computations, entry


def _arrays(type_: str) -> Iterator[tuple[int, bool]]:
    """Yield for each array of a type its bytes and whether it is in the device memory.

    A TPU program has arrays in other memory spaces too: on-chip memory and semaphores.
    """
    for dtype, shape, layout in _ARRAY.findall(type_):
        is_named = dtype in _ITEM_SIZES
        bits = 8 * _ITEM_SIZES[dtype] if is_named else int(re.search(r"\d+", dtype)[0])
        elements = math.prod(int(n) for n in shape.split(",") if n)
        yield elements * bits // 8, not re.search(r"S\([1-9]", layout)


def size(type_: str) -> int:
    """Return the bytes of a type in the device memory. The bytes of a tuple are summed."""
    return sum(count for count, in_device_memory in _arrays(type_) if in_device_memory)


# Operations without a kernel: names for existing memory, and constants.
_NO_KERNEL = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id",
    "replica-id", "opt-barrier", "iota",
}  # fmt: skip
_SCALAR_MEMORY = "S(6)"  # the memory space of the scalar unit of a TPU
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation that the device runs.

    Attributes:
      operation: the operation.
      runs: the number of runs.
      read: the bytes that one run reads.
      written: the bytes that one run writes.
    """

    operation: Operation
    runs: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """The bytes that all runs read and write."""
        return self.runs * (self.read + self.written)

    @property
    def cycles(self) -> int:
        """The compiler's estimate of the cycles of all runs; 0 without an estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.operation.attributes)
        return self.runs * int(found[1]) if found else 0


def _bytes_read_from(name: str, total: int, computation: Computation, computations: dict) -> int:
    """Return the bytes that a computation reads from one of its arrays of `total` bytes."""
    return min(
        total,
        sum(
            _bytes_read_by(user, i, total, computation, computations)
            for user in computation.values()
            for i, operand in enumerate(user.operands)
            if operand == name
        ),
    )


def _bytes_read_by(
    op: Operation, i: int, total: int, computation: Computation, computations: dict
) -> int:
    """Return the bytes that an operation reads from its operand `i` of `total` bytes.

    A slice reads only the sliced part. A dynamic-update-slice reads nothing from the array that
    it updates in place.
    """
    if i == 0 and op.op in _SLICES:
        return min(total, size(op.type))
    if i == 0 and op.op == "dynamic-update-slice":
        return 0
    if op.op == "bitcast" and not op.is_root:
        return _bytes_read_from(op.name, total, computation, computations)
    inner = computations.get(op.called("calls") or "", {})
    for x in inner.values():
        if x.op == "parameter" and x.attributes.startswith(f"({i})"):
            return _bytes_read_from(x.name, total, inner, computations)
    return total


def _bytes_written_by(op: Operation, computation: Computation, computations: dict) -> int:
    """Return the bytes that an operation writes. A dynamic-update-slice writes the update only."""
    if op.op == "dynamic-update-slice":
        return size(computation[op.operands[1]].type)
    inner = computations.get(op.called("calls") or "", {})
    results = [(x, inner) for x in inner.values() if x.is_root]
    if op.op in ("tuple", "bitcast"):
        results = [(computation[x], computation) for x in op.operands if x in computation]
    written = [
        _bytes_written_by(x, scope, computations) for x, scope in results if x.op != "parameter"
    ]
    return min(size(op.type), sum(written)) if written else size(op.type)


def _read_and_written(
    op: Operation, computation: Computation, computations: dict[str, Computation]
) -> tuple[int, int]:
    """Return the bytes that an operation reads and writes."""
    if op.op.endswith("-start"):
        # The result type of an asynchronous operation contains the operand's type too; that of a
        # slice-start contains it first.
        operand = sum(size(computation[name].type) for name in op.operands)
        read = operand
        if op.op == "slice-start":
            _, (sliced, _), *_ = _arrays(op.type)
            read = min(operand, sliced)
        return read, max(0, size(op.type) - operand)
    read = sum(
        _bytes_read_by(op, i, size(computation[name].type), computation, computations)
        for i, name in enumerate(op.operands)
        if name in computation
    )
    return read, _bytes_written_by(op, computation, computations)


def _trip_count(loop: Operation, computations: dict[str, Computation]) -> int:
    """Return the number of iterations of a loop.

    Without an annotation by the compiler the loop's condition is read: JAX's loops count from 0
    in steps of 1 and compare with a constant.
    """
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if found:
        return int(found[1])
    condition = computations[loop.called("condition")]
    root = next(op for op in condition.values() if op.is_root)
    if root.op == "fusion":
        condition = computations[root.called("calls")] | condition
    limits = [op for op in condition.values() if op.op == "constant"]
    if len(limits) != 1:
        raise Unavailable(f"the number of iterations of the loop {loop.name} is unknown")
    return int(limits[0].attributes.partition("(")[2].partition(")")[0])


def _branches(conditional: Operation) -> list[str]:
    """Return the names of the branch computations of a conditional."""
    listed = re.search(r"branch_computations=\{(.*?)\}", conditional.attributes)
    if listed:
        return re.findall(r"%([\w.-]+)", listed[1])
    return [conditional.called("true_computation"), conditional.called("false_computation")]


def kernels(hlo: str) -> list[Kernel]:
    """Return the kernels of a module.

    The kernels in the body of a loop run once per iteration. A conditional counts with the branch
    that moves fewer bytes, because the other branch handles rare inputs such as overflow.
    """
    computations, entry = parse(hlo)

    def run(name: str, runs: int) -> Iterator[Kernel]:
        computation = computations[name]
        for op in computation.values():
            if op.op == "while":
                yield from run(op.called("body"), runs * _trip_count(op, computations))
            elif op.op == "call":
                yield from run(op.called("to_apply"), runs)
            elif op.op == "conditional":
                branches = [list(run(branch, runs)) for branch in _branches(op)]
                yield from min(branches, key=lambda branch: sum(k.bytes for k in branch))
            elif (
                op.op not in _NO_KERNEL
                and not op.op.endswith("-done")
                and _SCALAR_MEMORY not in op.type
            ):
                yield Kernel(op, runs, *_read_and_written(op, computation, computations))

    return list(run(entry, 1))


# A device in a ring of j devices sends (j - 1) / j times this factor times the array.
_RING_FACTORS = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


class Sent(NamedTuple):
    """An array that a collective sends.

    Attributes:
      name: the name of the collective.
      devices: the number of devices that take part.
      bytes: the bytes that each device sends if the collective is a ring.
      scope: the JAX name scope of the collective or, if it sends several arrays, of the array.
    """

    name: str
    devices: int
    bytes: float
    scope: str


def sent(hlo: str) -> list[Sent]:
    """Return the arrays that the collectives of a module send.

    A collective in the body of a loop sends its array once per iteration. An asynchronous
    collective counts at its `-start`. A TPU program contains a reduce-scatter as an all-reduce
    inside a fusion, and one collective may send several unrelated arrays.
    """
    computations, _ = parse(hlo)
    every = {name: op for computation in computations.values() for name, op in computation.items()}

    def scope(name: str) -> str:
        op = every[name]
        return op.scope or next((x for x in map(scope, op.operands) if x), "")

    found = []
    for kernel in kernels(hlo):
        op = kernel.operation
        inner = computations.get(op.called("calls") or "", {}).values()
        fused = [x for x in inner if x.op == "all-reduce"]
        collective = fused[0] if fused else op
        name = "reduce-scatter" if fused else op.op.removesuffix("-start")
        if name not in _RING_FACTORS:
            continue
        devices = _group_size(collective)
        factor = kernel.runs * _RING_FACTORS[name] * (devices - 1) / devices
        sizes = [count for count, in_device_memory in _arrays(collective.type) if in_device_memory]
        if collective.op.endswith("-start") and len(sizes) == 2 * len(op.operands):
            sizes = sizes[len(op.operands) :]  # the operands precede the results
        own_scope = op.scope if len(op.operands) == 1 else ""
        for count, operand in zip(sizes, op.operands):
            found.append(Sent(name, devices, factor * count, own_scope or scope(operand)))
    return found


def _group_size(collective: Operation) -> int:
    """Return the number of devices per group, from any of HLO's notations of replica groups."""
    text = collective.attributes
    if listed := re.search(r"replica_groups=\{\{([\d,]*)", text):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted[1])
    sizes, axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text).groups()
    named = dict(re.findall(r"('\w+')=(\d+)", sizes))
    return math.prod(int(named[axis]) for axis in axes.split(","))


@dataclasses.dataclass(frozen=True)
class Report:
    """Statistics of a compiled program.

    Attributes:
      kernels: the number of kernel runs.
      bytes: the bytes that the kernels read and write.
      temporaries: the bytes of temporary memory.
      cycles: the estimated cycles on a TPU, None on a GPU. Kernels without an estimate count 0.
      unestimated: the number of kernels of a TPU program without an estimate.
    """

    kernels: int
    bytes: int
    temporaries: int
    cycles: int | None
    unestimated: int


def read(device: Device, compiled: jax.stages.Compiled) -> Report:
    """Return the statistics of a compiled program."""
    found = kernels(compiled.as_text())
    is_tpu = device.platform == "tpu"
    return Report(
        kernels=sum(k.runs for k in found),
        bytes=sum(k.bytes for k in found),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        cycles=sum(k.cycles for k in found) if is_tpu else None,
        unestimated=sum(is_tpu and k.operation.op == "fusion" and not k.cycles for k in found),
    )
