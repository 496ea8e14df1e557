"""`python -m pocl_cli`: the command `pocl`, for launchers that start a module (`torchrun … -m pocl_cli distill …`)."""

from pocl_cli.cli import main

if __name__ == "__main__":
    main()
