"""What XLA has compiled is kept for the next process: JAX's persistent compilation cache.

Programs keep it in the user's cache folder (`keep`); a library decides nothing of the kind. JAX's
own variables come first: JAX_ENABLE_COMPILATION_CACHE=false keeps nothing,
JAX_COMPILATION_CACHE_DIR names another folder, and the others change what they are for.
"""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path

# By JAX's options. Small programs too: there are many, and each is compiled again by every process.
SETTINGS = {
    "jax_compilation_cache_max_size": 2**30,
    "jax_persistent_cache_min_compile_time_secs": 0.02,
}


def keep() -> None:
    """Lets this process keep what it compiles, where it uses JAX and nothing else was asked for.

    Where the folder cannot be written, or another process holds it, programs are only compiled.
    """
    if "jax" not in sys.modules:
        return
    import jax

    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    path = folder()
    if path is None or not _mended(path):
        return
    # Of single entries: what cannot be read or written is compiled.
    warnings.filterwarnings("ignore", message="Error .* persistent compilation cache entry")
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(path))


def folder() -> Path | None:
    """Where this machine's programs are kept; None where the user has no home.

    XLA compiles for the very processor, and a home may be shared by machines: each kind of
    processor has a folder of its own.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The standard has relative ones ignored.
        caches = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return caches / "spak-jax" / f"{platform.machine()}-{_processor()}"


def _processor() -> str:
    """A short name for what this machine's processor can do."""
    description = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        # Once for each core.
        lines = [line for line in file if line.startswith(("model name", "flags", "Features"))]
        description = "".join(sorted(set(lines)))
    return hashlib.sha256(description.encode()).hexdigest()[:12]


def _mended(path: Path) -> bool:
    """Makes the folder ready, without what killed processes left in it; False where that fails.

    JAX writes a program and then when it was used last. It reads a program that was cut short again
    and again, and evicts nothing where the time of one is missing.
    """
    try:
        import filelock

        # Nobody else's: what is read from there is run.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path), filelock.FileLock(path / ".lockfile", timeout=1):
            kinds = {suffix: set() for suffix in ("-cache", "-atime")}
            for entry in os.scandir(path):
                for suffix, names in kinds.items():
                    if entry.name.endswith(suffix):
                        names.add(entry.name.removesuffix(suffix))
            programs, times = kinds.values()
            for suffix, names in (("-cache", programs - times), ("-atime", times - programs)):
                for name in names:
                    (path / f"{name}{suffix}").unlink()
    except (ImportError, OSError):
        return False
    return True
