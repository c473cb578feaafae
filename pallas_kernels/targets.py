"""What each GPU offers: enough to compile for one that is not there.

Limits of a block and of a multiprocessor: NVIDIA's CUDA Programming Guide, Compute Capabilities,
tables "Device and Streaming Multiprocessor Information" and "Memory Information". Sizes, speeds and
clocks of the products: as named beside each.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import jax

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Target:
    """One GPU product.

    chip: in words. known_as: the name of a chip of the same capability that Pallas knows.
    capability: compute capability, major and minor. multiprocessors: their number. shared_memory:
    bytes that one block can ask for at most. shared_memory_per_core: bytes of a multiprocessor.
    threads_per_core: that a multiprocessor can hold. l2, memory: bytes. bandwidth: of the memory,
    bytes a second. clock_ghz: boost clock. products: dense bfloat16 products on the tensor cores
    with sums in float32, operations a second.
    """

    chip: str
    known_as: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    shared_memory_per_core: int
    threads_per_core: int
    l2: int
    memory: int
    bandwidth: float
    clock_ghz: float
    products: float

    def description(self) -> str:
        """XLA's GpuTargetConfigProto in text form, by which it compiles without the GPU."""
        major, minor = self.capability
        # ACCELERATED_FEATURES is what XLA finds on all of these chips itself.
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024
              threads_per_warp: 32
              shared_memory_per_block: {48 * KIB}
              shared_memory_per_block_optin: {self.shared_memory}
              shared_memory_per_core: {self.shared_memory_per_core}
              threads_per_core_limit: {self.threads_per_core}
              core_count: {self.multiprocessors}
              fpus_per_core: 128
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.l2}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES
              }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.known_as}"
        """


TARGETS = {
    # The baseline's card (GB205). Not checked against NVIDIA's own paper, which could not be had:
    # multiprocessors, L2, memory, bandwidth and clock are NVIDIA's figures as reviews repeat them.
    "rtx5070": Target(
        chip="NVIDIA GeForce RTX 5070",
        known_as="NVIDIA RTX PRO 6000",
        capability=(12, 0),
        multiprocessors=48,
        shared_memory=99 * KIB,
        shared_memory_per_core=100 * KIB,
        threads_per_core=1536,
        l2=48 * MIB,
        memory=12_227 * MIB,
        bandwidth=672e9,
        clock_ghz=2.51,
        # 512 a clock and multiprocessor, as NVIDIA's figures for its larger sisters come to.
        products=61.7e12,
    ),
    # What the chip's driver says, by XLA's own description of it (b200.txtpb, openxla/xla).
    # NVIDIA's DGX B200 data sheet rounds to 180 GB and 8 TB/s.
    "b200": Target(
        chip="NVIDIA B200",
        known_as="NVIDIA B200",
        capability=(10, 0),
        multiprocessors=148,
        shared_memory=227 * KIB,
        shared_memory_per_core=228 * KIB,
        threads_per_core=2048,
        l2=132_644_864,
        memory=191_514_411_008,
        bandwidth=7.672e12,
        clock_ghz=1.965,
        # An eighth of a DGX B200's 72 PFLOP/s in FP8 with sparsity, and a quarter of that.
        products=2.25e15,
    ),
    # The SXM5 module. What its driver says, likewise (h100_sxm.txtpb).
    "h100": Target(
        chip="NVIDIA H100 80GB HBM3",
        known_as="NVIDIA H100",
        capability=(9, 0),
        multiprocessors=132,
        shared_memory=227 * KIB,
        shared_memory_per_core=228 * KIB,
        threads_per_core=2048,
        l2=50 * MIB,
        memory=84_942_979_072,
        bandwidth=3.352e12,
        clock_ghz=1.98,
        # NVIDIA's H100 data sheet, half of the figure with sparsity.
        products=989e12,
    ),
}

# A chip that is not listed gets the tiles of the one with the least shared memory.
MOST_CAUTIOUS = "rtx5070"


def parse_targets(text: str) -> tuple[str, ...]:
    """`rtx5070,b200` as names of targets, for a command line.

    Raises:
      argparse.ArgumentTypeError: one is not in `TARGETS`.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in TARGETS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(TARGETS)}")
    return names


def name_of(capability: str) -> str | None:
    """The target whose tiles suit a GPU, by its compute capability as JAX gives it, such as "9.0".

    None for what the kernels are not for: GPUs older than 8.0, and those of other vendors.
    """
    major, _, minor = capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()) or int(major) < 8:
        return None
    for name, target in TARGETS.items():
        if target.capability == (int(major), int(minor)):
            return name
    return MOST_CAUTIOUS


# The chip that is compiled for, where it is not the one at hand.
_elsewhere: ContextVar[str | None] = ContextVar("elsewhere", default=None)


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Within it, programs are traced as they would be on that target's GPU."""
    token = _elsewhere.set(name)
    try:
        with jax.sharding.use_abstract_mesh(_absent(name)):
            yield
    finally:
        _elsewhere.reset(token)


@functools.cache
def _absent(name: str) -> jax.sharding.AbstractMesh:
    """The one GPU of a machine that is not there, as Pallas asks for it while it lowers."""
    target = TARGETS[name]
    # All as `aot.placed` has it by the target's description: JAX takes no two meshes.
    device = jax.sharding.AbstractDevice(
        device_kind=target.known_as, num_cores=target.multiprocessors, platform="gpu"
    )
    return jax.sharding.AbstractMesh(
        (1,), ("gpu",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )


# Whether programs are traced as where there are no kernels.
_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, what is not asked for by name is left to XLA, to be compared with."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def target_at_hand() -> str | None:
    """The target whose tiles suit the device at hand, None if the kernels are not for it.

    A CPU interprets the kernels, with any tiles.
    """
    return _elsewhere.get() or _found()


@functools.cache
def _found() -> str | None:
    if jax.default_backend() == "cpu":
        return "h100"
    return name_of(getattr(jax.devices()[0], "compute_capability", ""))


def on_gpu() -> bool:
    """Whether programs are compiled for a GPU."""
    return _elsewhere.get() is not None or jax.default_backend() == "gpu"


def kernels_run() -> bool:
    """Whether the kernels run on what programs are compiled for, and not interpreted."""
    return on_gpu() and target_at_hand() is not None and not _plain.get()
