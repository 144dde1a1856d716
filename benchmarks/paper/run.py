"""The paper's tables in miniature: three phases of training, merges by bam-merge between them, measurements, a page.

    python benchmarks/paper/run.py [--config FILE] [--work DIR] [--workers N]

Every stage is kept in --work (its folder is named by all it was made from), so a run that was stopped goes on. A GPU is used where
torch has one, by gpu.yaml; else config.yaml.
"""

import argparse
from pathlib import Path

from settings import graphs, load_config
from stages import make_all

HERE = Path(__file__).parent


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: gpu.yaml where torch has a GPU, else config.yaml")
    parser.add_argument("--work", type=Path, default=HERE / "work", metavar="DIR", help="where stages are kept (default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="stages at a time (default: the configuration's)")
    options = parser.parse_args()
    config = load_config(options.config or HERE / ("gpu.yaml" if has_gpu() else "config.yaml"))
    stages = [stage for graph in graphs(config) for stage in graph.stages()]
    unique = list({stage.digest: stage for stage in stages}.values())
    make_all(unique, options.work, options.workers or config["workers"], config["threads"])


if __name__ == "__main__":
    main()
