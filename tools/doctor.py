"""The command incr-doctor, by its path."""

from incr_ds.cli.doctor import main

if __name__ == "__main__":
    main()
