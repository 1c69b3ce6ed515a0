"""The command incr-write-sbatch, by its path."""

from incr_ds.cli.write_sbatch import main

if __name__ == "__main__":
    main()
