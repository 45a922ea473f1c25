"""`python -m edgeprune.distill` is `edgeprune distill`, for launchers that start a module."""

if __name__ == "__main__":
    import sys

    from edgeprune.cli import main

    sys.argv.insert(1, "distill")
    main()
