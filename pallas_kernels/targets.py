"""The GPUs that the kernels are made for, as their makers describe them.

Sources: NVIDIA's CUDA programming guide (limits by compute capability) and the data sheets and
white papers of each chip. Speeds are data-sheet values, not measurements.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One GPU: what bounds a kernel there. Sizes in bytes, bandwidth in bytes a second.

    shared_memory: what one block may have at most, after asking for it.
    """

    name: str
    chip: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    shared_memory_per_multiprocessor: int
    threads_per_multiprocessor: int
    l2: int
    memory: int
    bandwidth: float
    clock_ghz: float

    def description(self) -> str:
        """A `GpuTargetConfigProto` in text form, from which XLA compiles without the GPU."""
        major, minor = self.capability
        return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_core: {self.shared_memory_per_multiprocessor}
          threads_per_core_limit: {self.threads_per_multiprocessor}
          core_count: {self.multiprocessors}
          fpus_per_core: 128
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {int(self.bandwidth)}
          l2_cache_size: {self.l2}
          clock_rate_ghz: {self.clock_ghz}
          device_memory_size: {self.memory}
          shared_memory_per_block_optin: {self.shared_memory}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{self.chip}"
        """


TARGETS = {
    target.name: target
    for target in (
        Target("rtx5070", "NVIDIA GeForce RTX 5070", (12, 0), 48, 101_376, 102_400, 1536,
               48 * 2**20, 12 * 2**30, 672e9, 2.51),
        Target("b200", "NVIDIA B200", (10, 0), 148, 232_448, 233_472, 2048,
               126 * 2**20, 180 * 2**30, 8e12, 1.96),
        Target("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448, 233_472, 2048,
               50 * 2**20, 80 * 2**30, 3.35e12, 1.98),
    )
}  # fmt: skip
