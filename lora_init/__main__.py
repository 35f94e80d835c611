"""`lora-init` and `python -m lora_init`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; returns its exit status."""
    try:
        from lora_init import cli
    except ModuleNotFoundError as error:
        print(
            f"lora-init: the command line needs {error.name}: pip install 'lora-init[cli]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
