"""What all programs share: how they fail, print and show progress.

A program is a module with a `main` that `run_program` runs. All that people read goes through
`console`, which takes no text for markup; tables are `Table`, which cuts nothing, and whatever
takes more than seconds happens within `progress`.
"""

from pallas_kernels.programs.progress_bar import Progress, progress
from pallas_kernels.programs.run import (
    DEVICE_FILES,
    Failure,
    InputError,
    expect_no_libraries,
    first_line,
    require_devices,
    run_program,
)
from pallas_kernels.programs.terminal import Table, console

__all__ = [
    "DEVICE_FILES",
    "Failure",
    "InputError",
    "Progress",
    "Table",
    "console",
    "expect_no_libraries",
    "first_line",
    "progress",
    "require_devices",
    "run_program",
]
