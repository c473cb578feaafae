"""How programs start and fail: `run_program`, and the exceptions that end one with a message."""

import os
import signal
import sys
from collections.abc import Callable

from pallas_kernels.programs import compilation_cache
from pallas_kernels.programs.streams import standard_streams

# By any of these JAX takes it that there is a GPU of NVIDIA's.
DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


class Failure(Exception):
    """A program cannot go on. It prints `label` and the message alone, and exits with `status`."""

    status = 1
    label = "error"


class InputError(Failure, ValueError):
    """What the user gave cannot be used: the message names the field, the value and a way out.

    A ValueError, too, for whoever calls from Python.
    """

    status = 2


def run_program(main: Callable[[], None]) -> None:
    """Runs `main`; a `Failure` ends the process with its message and status, no traceback.

    Output that cannot be written stops no work: it is dropped, files are written all the same, and
    the status tells. It is 141, without a message, where a reader such as `head` has gone, as if
    SIGPIPE had ended the program; 1, with a message, where a disk is full. What the output's
    encoding lacks is written as an escape, such as `\\xe9`.
    """
    with standard_streams() as lost:
        expect_no_libraries()
        compilation_cache.keep()
        try:
            try:
                main()
            except (AssertionError, RuntimeError):
                # What a JAX without devices raises, anywhere.
                if "jax" in sys.modules:
                    require_devices()
                raise
            status = 0
        except Failure as error:
            print(f"{error.label}: {error}", file=sys.stderr)
            status = error.status
        except KeyboardInterrupt:
            print("stopped: SIGINT", file=sys.stderr)
            status = 128 + signal.SIGINT
        except SystemExit as end:
            status = end.code
        error = lost()
        if error and not status:
            status = 128 + signal.SIGPIPE
            if not isinstance(error, BrokenPipeError):
                print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
                status = 1
    if status:
        raise SystemExit(status)


def expect_no_libraries() -> None:
    """For a program, before it uses JAX: where there is no GPU, its libraries are not missed.

    JAX's plugin is also installed to compile for absent GPUs. Without one JAX leaves it alone, but
    not before it has looked for cuDNN and printed a traceback because that is not there.
    """
    if not any(map(os.path.exists, DEVICE_FILES)):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def require_devices() -> None:
    """Starts JAX's platform, which everything that computes needs.

    Raises:
      InputError: it does not start; the message says which was asked for, and what is there.
    """
    import jax

    try:
        jax.devices()
    # It asserts where none of the platforms asked for is there.
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        said = str(error).strip().splitlines()
        why = said[0][:200] if said else "it finds no device of that kind"
        raise InputError(
            f"JAX cannot start {f'on JAX_PLATFORMS={asked}' if asked else 'here'} ({why}):"
            " JAX_PLATFORMS=cpu is there on every machine; unset, JAX takes what it finds"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line that is not too long."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
