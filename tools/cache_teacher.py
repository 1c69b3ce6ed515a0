"""The command incr-cache-teacher, by its path."""

from incr_ds.cli.cache_teacher import main

if __name__ == "__main__":
    main()
