"""``python -m resnetv2_cli`` is ``resnetv2``."""

from resnetv2_cli.cli import main

if __name__ == "__main__":
    main()
