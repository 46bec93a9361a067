"""Optional packages: import one, or name the extra that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from embedkit._io.text import one_line
from embedkit.errors import MissingDependencyError

#: The name of this distribution on the package index. It is empty until a name is registered: `embedkit` on the index
#: is another project, so a hint with that name would install a stranger's code.
DISTRIBUTION = ""


def install_hint(extra: str) -> str:
    """The command that installs an extra of embedkit, such as `hub` or `train,cpu`, for a message."""
    if DISTRIBUTION:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install '.[{extra}]' in a checkout of embedkit"


@contextmanager
def requires(purpose: str, extra: str = "", *, package: str = "", note: str = "") -> Iterator[None]:
    """Turn an ImportError of the block into one sentence that names the package and how to install it.

        with requires("scores of a clustering", "analysis"):
            from scipy.optimize import linear_sum_assignment

    An ImportError that embedkit itself caused is not changed.

    Args:
        purpose: What needs the package.
        extra: The extra of embedkit that has it; where empty, the hint installs `package` itself.
        package: Its name on the package index; the name of the failed import when empty.
        note: What is added to the hint.

    Raises:
        MissingDependencyError: The block failed to import something.
    """
    try:
        yield
    except MissingDependencyError:
        raise
    except ImportError as error:
        failed = (error.name or "").partition(".")[0]
        if failed == "embedkit":
            raise
        package = package or failed or "a package"
        hint = install_hint(extra) if extra else f"pip install {package}"
        raise MissingDependencyError(
            f"{package} cannot be imported ({one_line(error)}), and {purpose} needs it: {hint}{note}"
        ) from None
