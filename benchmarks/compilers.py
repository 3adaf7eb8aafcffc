"""What XLA's GPU and TPU compilers make of a program, on a machine that has neither device.

The compilers are libraries of the package index (`make accelerators` installs them beside
JAX). They compile for a device that is only described, and the program that comes out can be
read: which kernels there are, what each of them reads and writes, how much memory is needed
in between, and on a TPU how many cycles the compiler expects. None of that is a measured
time: the bytes over a device's bandwidth are a bound from below.
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
    """A device that a compiler knows: its name, its platform and what describes it to XLA."""

    name: str
    platform: str  # "cuda", "rocm" or "tpu"
    bandwidth: float  # of its memory, bytes a second
    topology: str  # by which the compiler knows it
    target: str | None = None  # of a GPU: a GpuTargetConfigProto as text

    @functools.cached_property
    def devices(self) -> Any:
        """Return the topology's devices, or raise `Unavailable`."""
        _register(self.platform)
        options = {}
        if self.target is not None:
            options = {"target_config": self.target, "topology": "1x1x1"}
        try:
            return topologies.get_topology_desc(self.topology, self.platform, **options).devices
        except Exception as error:  # each plugin raises in a way of its own
            raise Unavailable(f"{self.name}: {first_line(error)}") from error


class Unavailable(Exception):
    """A compiler that is not installed, does not know a device or refuses a program."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
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
    """Return a GPU, described by the figures that XLA's compiler asks for."""
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


# The GPUs' figures are those that XLA itself has of them (openxla/xla,
# xla/backends/gpu/target_config/specs); the TPUs' bandwidths are Google Cloud's.
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

# The package of each platform's compiler.
PACKAGES = {
    "cuda": "jax_plugins.xla_cuda13",
    "rocm": "jax_plugins.xla_rocm7",
    "tpu": "libtpu",
}


def installed() -> bool:
    """Return whether a compiler of any platform is installed."""
    return any(_found(package) for package in PACKAGES.values())


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


def prepare() -> None:
    """Set the environment that the compilers read when they load: call it before JAX runs.

    Without it the TPU's library looks for the machine that it runs on, and the CUDA compiler
    measures candidates on a GPU that is not there.
    """
    for name, value in {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # or it looks for CUDA's libraries
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no device to quarrel over
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
    """Make JAX know the platform's compiler, or raise `Unavailable`."""
    package = PACKAGES[platform]
    if not _found(package):
        raise Unavailable(f"{platform}: the package {package} is not installed")
    jax.devices()  # the first call looks for plugins, and registers them


def device(name: str) -> Device:
    """Return the device of that name, or raise `Unavailable`."""
    if name not in DEVICES:
        raise Unavailable(f"{name}: got no device of that name, wanted one of {tuple(DEVICES)}")
    found = DEVICES[name]
    found.devices  # noqa: B018  whether its compiler is installed and knows it
    return found


def compile_for(device: Device, function: Callable, *args: Any) -> jax.stages.Compiled:
    """Compile a function of arrays, or of their shapes and dtypes, for one such device."""
    one = SingleDeviceSharding(device.devices[0])
    try:
        return jax.jit(function, in_shardings=one, out_shardings=one).lower(*args).compile()
    except Exception as error:
        raise Unavailable(f"{device.name}: {first_line(error)}") from error


# ---------------------------------------------------------------- HLO


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of HLO."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def scope(self) -> str:
        """The name that it was traced under."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """Return the computation that an attribute names, such as a loop's `body`."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found and found[1]


Computation = dict[str, Operation]

_LINE = re.compile(r"\s*(ROOT )?%?([\w.-]+) = (.*)")
_START = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\](\{[^}]*\})?")
_SIZES = {"pred": 1, "c64": 8, "c128": 16}


def _closing(text: str, start: int) -> int:
    """Return where the parenthesis that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text!r}")


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """Return a module's computations by name, and the name of the one that it starts with."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        if line and not line[0].isspace() and (start := _START.match(line)):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            root, name, rest = found.groups()
            end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
            type_, rest = rest[:end], rest[end:].lstrip()
            opened = rest.index("(")
            closed = _closing(rest, opened)
            operands = re.findall(r"%([\w.-]+)", rest[opened:closed])
            current[name] = Operation(
                name, type_, rest[:opened], tuple(operands), rest[opened:], bool(root)
            )
    return computations, entry


def _arrays(type_: str) -> Iterator[tuple[int, bool]]:
    """Yield the bytes of every array of a type, and whether they are in the device's memory.

    A TPU keeps some on the chip, and semaphores elsewhere.
    """
    for dtype, shape, layout in _ARRAY.findall(type_):
        bits = 8 * _SIZES[dtype] if dtype in _SIZES else int(re.search(r"\d+", dtype)[0])
        elements = math.prod(int(n) for n in shape.split(",") if n)
        yield elements * bits // 8, not re.search(r"S\([1-9]", layout)


def size(type_: str) -> int:
    """Return the bytes that a type has in the device's memory, a tuple's those of its parts."""
    return sum(found for found, in_memory in _arrays(type_) if in_memory)


# What costs nothing: a name for memory that is there already, or a constant.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id",
    "replica-id", "opt-barrier", "iota",
}  # fmt: skip
_SCALARS = "S(6)"  # the memory of a TPU's scalar unit
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation that the device runs, and how often."""

    operation: Operation
    times: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        """Return what all its runs move."""
        return self.times * (self.read + self.written)

    @property
    def cycles(self) -> int:
        """Return what the compiler expects all its runs to take; 0 where it does not say."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.operation.attributes)
        return self.times * int(found[1]) if found else 0


def _read_of(name: str, whole: int, computation: Computation, computations: dict) -> int:
    """Return the bytes that a computation reads of one of its arrays, which has `whole`."""
    return min(
        whole,
        sum(
            _read_by(user, i, whole, computation, computations)
            for user in computation.values()
            for i, operand in enumerate(user.operands)
            if operand == name
        ),
    )


def _read_by(
    op: Operation, i: int, whole: int, computation: Computation, computations: dict
) -> int:
    """Return the bytes that an operation reads of its operand `i`, which has `whole`.

    Of what it only slices, the slices count, and of what it puts a part in, nothing.
    """
    if i == 0 and op.op in _SLICES:
        return min(whole, size(op.type))
    if i == 0 and op.op == "dynamic-update-slice":
        return 0
    if op.op == "bitcast" and not op.root:
        return _read_of(op.name, whole, computation, computations)
    inner = computations.get(op.called("calls") or "", {})
    for x in inner.values():
        if x.op == "parameter" and x.attributes.startswith(f"({i})"):
            return _read_of(x.name, whole, inner, computations)
    return whole


def _written_by(op: Operation, computation: Computation, computations: dict) -> int:
    """Return the bytes that an operation writes: of an array that it puts a part in, the part."""
    if op.op == "dynamic-update-slice":
        return size(computation[op.operands[1]].type)
    inner = computations.get(op.called("calls") or "", {})
    parts = [(x, inner) for x in inner.values() if x.root]
    if op.op in ("tuple", "bitcast"):
        parts = [(computation[x], computation) for x in op.operands if x in computation]
    parts = [_written_by(x, place, computations) for x, place in parts if x.op != "parameter"]
    return min(size(op.type), sum(parts)) if parts else size(op.type)


def _read_and_written(
    op: Operation, computation: Computation, computations: dict[str, Computation]
) -> tuple[int, int]:
    """Return the bytes that an operation reads and writes."""
    if op.op.endswith("-start"):  # its type names the operand once more, a slice's as the first
        operand = sum(size(computation[name].type) for name in op.operands)
        read = operand
        if op.op == "slice-start":
            _, (brought, _), *_ = _arrays(op.type)
            read = min(operand, brought)
        return read, max(0, size(op.type) - operand)
    read = sum(
        _read_by(op, i, size(computation[name].type), computation, computations)
        for i, name in enumerate(op.operands)
        if name in computation
    )
    return read, _written_by(op, computation, computations)


def _trips(loop: Operation, computations: dict[str, Computation]) -> int:
    """Return how often a loop runs.

    Where the compiler does not say so, the condition does: all of these loops count from 0, by
    one, while less than a constant.
    """
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if found:
        return int(found[1])
    condition = computations[loop.called("condition")]
    root = next(op for op in condition.values() if op.root)
    if root.op == "fusion":
        condition = computations[root.called("calls")] | condition
    limits = [op for op in condition.values() if op.op == "constant"]
    if len(limits) != 1:
        raise Unavailable(f"the loop {loop.name} does not say how often it runs")
    return int(limits[0].attributes.partition("(")[2].partition(")")[0])


def _branches(conditional: Operation) -> list[str]:
    """Return the names of a conditional's computations, which stand in a list or one by one."""
    listed = re.search(r"branch_computations=\{(.*?)\}", conditional.attributes)
    if listed:
        return re.findall(r"%([\w.-]+)", listed[1])
    return [conditional.called("true_computation"), conditional.called("false_computation")]


def kernels(hlo: str) -> list[Kernel]:
    """Return what a module runs on the device, loops' bodies with the number of their trips."""
    computations, entry = parse(hlo)

    def run(name: str, times: int) -> Iterator[Kernel]:
        computation = computations[name]
        for op in computation.values():
            if op.op == "while":
                yield from run(op.called("body"), times * _trips(op, computations))
            elif op.op == "call":
                yield from run(op.called("to_apply"), times)
            elif op.op == "conditional":
                # The cheaper branch counts: the other is there for numbers out of the ordinary.
                names = _branches(op)
                yield from min(
                    (list(run(x, times)) for x in names), key=lambda ks: sum(k.bytes for k in ks)
                )
            elif op.op not in _FREE and not op.op.endswith("-done") and _SCALARS not in op.type:
                yield Kernel(op, times, *_read_and_written(op, computation, computations))

    return list(run(entry, 1))


# What a device of a ring of j sends, over the array and (j - 1) / j.
_RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


class Sent(NamedTuple):
    """An array that a collective sends."""

    name: str  # of the collective
    devices: int  # that it joins
    bytes: float  # that each of them sends, as in a ring
    scope: str  # what it is traced under, or if several are sent together its array


def sent(hlo: str) -> list[Sent]:
    """Return what the collectives of a module send, a loop's as often as it runs.

    A collective's `-start` counts, and not its `-done`. A TPU writes a reduce-scatter as an
    all-reduce within a fusion, and sends arrays together that have nothing else in common.
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
        if name in _RINGS:
            devices = _group(collective)
            share = kernel.times * _RINGS[name] * (devices - 1) / devices
            sizes = [count for count, in_memory in _arrays(collective.type) if in_memory]
            if collective.op.endswith("-start") and len(sizes) == 2 * len(op.operands):
                sizes = sizes[len(op.operands) :]  # its type names the operands first
            alone = op.scope if len(op.operands) == 1 else ""
            for count, operand in zip(sizes, op.operands):
                found.append(Sent(name, devices, share * count, alone or scope(operand)))
    return found


def _group(collective: Operation) -> int:
    """Return how many devices a collective joins, in any of the ways in which HLO says so."""
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
    """What a compiler made of a program."""

    kernels: int
    bytes: int
    temporaries: int
    cycles: int | None  # of a TPU; 0 where the compiler does not say
    unestimated: int  # kernels of a TPU that it does not say it of


def read(device: Device, compiled: jax.stages.Compiled) -> Report:
    """Return what the compiler made of a program."""
    ran = kernels(compiled.as_text())
    tpu = device.platform == "tpu"
    return Report(
        kernels=sum(k.times for k in ran),
        bytes=sum(k.bytes for k in ran),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        cycles=sum(k.cycles for k in ran) if tpu else None,
        unestimated=sum(tpu and k.operation.op == "fusion" and not k.cycles for k in ran),
    )
