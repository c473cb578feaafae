"""What every measurement names: device, version of JAX, date, and commit of this code."""

import datetime
import subprocess
from pathlib import Path

import jax


def where_and_when() -> dict[str, str | None]:
    """`device`, `jax`, `date` and `commit`, as results files hold them."""
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }


def device_name() -> str:
    """What this process computes on, as JAX names it."""
    return jax.devices()[0].device_kind


def commit() -> str | None:
    """The commit of this code, marked where its files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD")
        # An installed copy may lie inside somebody else's checkout.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        # Results and figures that programs leave in a checkout are not its code.
        changed = git("status", "--porcelain", "--", "..", ":(exclude,top)figures")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+changes" if changed else commit
