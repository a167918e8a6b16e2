"""``python -m volumejax`` is the ``volumejax`` command."""

from volumejax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
