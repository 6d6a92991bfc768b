"""`internvit` and `python -m internvit`."""

import sys


def main() -> None:
    try:
        from internvit.cli.app import run
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("internvit"):
            raise
        print(f"internvit: the command line needs {error.name}: pip install 'internvit[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
