"""`python cli.py recipe.yaml` in a checkout; installed, the same is `bam-merge recipe.yaml`."""

from bam_merge.cli import main

if __name__ == "__main__":
    main()
