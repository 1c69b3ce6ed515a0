"""The command incr-inspect, by its path."""

from incr_ds.cli.inspect_checkpoint import main

if __name__ == "__main__":
    main()
