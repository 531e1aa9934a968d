"""Entry point of `python -m igpt_jax` and of the console script `igpt`; reports missing packages in one line."""

import sys
from collections.abc import Sequence

from igpt_jax import process


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m igpt_jax ARGUMENTS` and returns the exit code."""
    if arguments is None:
        process.open_streams()
    try:
        from igpt_jax import command_line  # here, so that its missing packages are reported below

        return command_line.main(arguments)
    except ModuleNotFoundError as error:
        if missing := process.missing_package(error):
            process.say(f"igpt_jax: {missing}", sys.stderr)
            return 2
        raise


if __name__ == "__main__":
    sys.exit(main())
