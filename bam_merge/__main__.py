"""`python -m bam_merge`, the same as `bam-merge`."""

from bam_merge.cli import main

if __name__ == "__main__":
    main()
